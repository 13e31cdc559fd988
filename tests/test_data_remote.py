"""The training data where runs find it: on S3 (a real server of its protocol) and on the hub (a stand-in of its API)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote

import pytest
import s3
import s3fs
from samples import sample, write_shards, write_tar

from artemis_vlm import LIGHT, RunError
from pipelines import data, storage, tar_index
from pipelines.data import Position
from pipelines.shards import find_shards, open_rows

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3 shards of 4 rows. Not to be written to."""
    return write_shards(tmp_path_factory.mktemp("shards"), 3, 4)


def samples_of(uri: str) -> list[tuple[str, bytes, bytes]]:
    """The first epoch in its order."""
    source = data.find_source(uri, 1, 0)
    turns = islice(source.turns(Position()), len(source.shards))
    return [(raw.uid, raw.image, raw.text) for turn in turns for _, raw in turn.read()]


# --- S3 --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def s3_server() -> Iterator[str]:
    with s3.moto() as url:
        yield url


@pytest.fixture
def bucket(s3_server: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """s3:// location of the shards."""
    for name, value in s3.environment(s3_server).items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()  # an earlier one would know another endpoint
    files = s3fs.S3FileSystem()
    if not files.exists("data"):
        files.mkdir("data")
        files.put(f"{folder}/", "data/deep/shards/", recursive=True)
        files.pipe_file("data/deep/README.md", b"-")
    yield "s3://data/deep"
    s3fs.S3FileSystem.clear_instance_cache()


def test_s3_gives_the_same_samples_in_the_same_order(bucket: str, folder: Path) -> None:
    local = samples_of(str(folder))
    assert len(local) == 12
    assert samples_of(bucket) == local
    assert samples_of(f"{bucket}/shards/*.tar") == local
    (one,) = find_shards(f"{bucket}/shards/sa_000001.tar")
    assert one.uri == "s3://data/deep/shards/sa_000001.tar"
    with open_rows(one) as rows:
        assert [rows[i].uid for i in range(len(rows))] == [f"sa_000001.tar/{n:05d}" for n in range(4, 8)]


def test_nothing_is_left_behind(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with open_rows(find_shards(bucket)[0]) as rows:
        assert len(rows) == 4
        assert len(list(tmp_path.rglob("*"))) == 1, "an empty folder, even if the process is killed now"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("failures", "attempts"), [(2, 3), (99, 4)])
def test_a_shard_that_fails_is_tried_again_then_named(
    bucket: str, monkeypatch: pytest.MonkeyPatch, failures: int, attempts: int
) -> None:
    tried: list[str] = []
    pauses: list[float] = []
    files = s3fs.S3FileSystem()  # the one that everybody gets
    get_file = files.get_file

    def failing(remote: str, local: str) -> None:
        tried.append(remote)
        if len(tried) <= failures:
            Path(local).write_bytes(b"half")
            raise ConnectionResetError("reset by peer")
        get_file(remote, local)

    monkeypatch.setattr(files, "get_file", failing)
    monkeypatch.setattr(storage.time, "sleep", pauses.append)
    shard = find_shards(bucket)[0]
    if failures < storage.ATTEMPTS:
        with open_rows(shard) as rows:
            assert len(rows) == 4
    else:
        sentence = r"s3://data/deep/shards/sa_000000\.tar could not be read in 4 attempts: reset by peer"
        with pytest.raises(RunError, match=sentence), open_rows(shard):
            pass
    assert tried == ["data/deep/shards/sa_000000.tar"] * attempts
    assert pauses == [1.0, 2.0, 4.0][: attempts - 1]


def test_the_index_of_a_shard_on_s3_is_remembered_for_its_etag(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ARTEMIS_VLM_CACHE", str(tmp_path))
    monkeypatch.setattr(tar_index, "MIN_REMEMBERED", 1)
    walked: list[int] = []
    walk = tar_index.walk
    monkeypatch.setattr(tar_index, "walk", lambda file, size: walked.append(size) or walk(file, size))
    files = s3fs.S3FileSystem()
    old = write_tar(tmp_path / "old.tar", map(sample, range(4))).read_bytes()
    new = write_tar(tmp_path / "new.tar", [(f"new{n:02d}", sample(n)[1]) for n in range(4)]).read_bytes()
    files.pipe_file("data/renewed/a.tar", old)
    (shard,) = find_shards("s3://data/renewed")

    def read() -> list[tuple[str, bytes]]:
        with open_rows(shard) as rows:
            return [(rows[i].uid, rows[i].text) for i in range(len(rows))]

    first = read()
    assert read() == first
    assert len(walked) == 1
    assert find_shards("s3://data/renewed") == [shard]  # which remembers the listing
    s3fs.S3FileSystem(skip_instance_cache=True).pipe_file("data/renewed/a.tar", new)  # as another process does
    assert [uid for uid, _ in read()] == [f"a.tar/new{n:02d}" for n in range(4)]
    assert walked == [len(old)] * 2 == [len(new)] * 2


def test_an_s3_place_without_data_is_told_in_a_sentence(bucket: str) -> None:
    with pytest.raises(RunError, match=r"s3://data/other holds nothing"):
        find_shards("s3://data/other")
    with pytest.raises(RunError, match=r"s3://no-such-bucket/x (cannot be listed|holds nothing)"):
        find_shards("s3://no-such-bucket/x")


# --- the hub ---------------------------------------------------------------------------------------------------------

SHA = {"main": "a" * 40, "v1": "b" * 40}


class Hub(BaseHTTPRequestHandler):
    """What huggingface_hub and datasets ask of a hub, for the one data set `org/name`; branches hold the same files."""

    files: dict[str, bytes]
    asked: list[str]

    def log_message(self, *_: object) -> None: ...

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        form = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
        self.answer_json([self.info(path) for path in form["paths"] if path in self.files])

    def do_GET(self) -> None:
        path = unquote(self.path.split("?")[0])
        self.asked.append(path)
        api, resolve = "/api/datasets/org/name", "/datasets/org/name/resolve/"
        if path.startswith(resolve):
            revision, _, name = path.removeprefix(resolve).partition("/")
            self.answer_file(revision, name)
        elif path == api or path.startswith(f"{api}/revision/"):
            revision = path.removeprefix(api).removeprefix("/revision/") or "main"
            sha = SHA.get(revision, revision if revision in SHA.values() else None)
            if sha:
                self.answer_json({"id": "org/name", "sha": sha, "siblings": [{"rfilename": n} for n in self.files]})
            else:
                self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        elif path.startswith(f"{api}/tree/"):
            _, _, under = path.removeprefix(f"{api}/tree/").partition("/")
            self.answer_tree(under, "recursive=True" in self.path or "recursive=true" in self.path)
        else:
            self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})

    def answer_tree(self, under: str, recursive: bool) -> None:
        prefix = f"{under}/" if under else ""
        below = [n for n in self.files if n.startswith(prefix)]
        folders = sorted({n.rpartition("/")[0] for n in below if "/" in n.removeprefix(prefix)})
        if not below:
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        found = [self.info(n) for n in below if recursive or "/" not in n.removeprefix(prefix)]
        return self.answer_json([{"type": "directory", "path": f, "oid": "0" * 40, "size": 0} for f in folders] + found)

    def answer_file(self, revision: str, name: str) -> None:
        if name not in self.files:
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        content, size = self.files[name], len(self.files[name])
        headers = {"X-Repo-Commit": SHA.get(revision, revision), "ETag": f'"{size}"', "Accept-Ranges": "bytes"}
        if not (span := self.headers.get("Range")):
            return self.answer(200, content, headers)
        first, _, last = span.removeprefix("bytes=").partition("-")
        end = min(int(last), size - 1) if last else size - 1
        headers["Content-Range"] = f"bytes {first}-{end}/{size}"
        return self.answer(206, content[int(first) : end + 1], headers)

    def info(self, name: str) -> dict[str, Any]:
        return {"type": "file", "path": name, "size": len(self.files[name]), "oid": "0" * 40}

    def answer_json(self, value: object) -> None:
        self.answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@contextmanager
def hub(files: dict[str, bytes]) -> Iterator[tuple[str, list[str]]]:
    """Its address, and the paths that were asked for."""
    handler = type("OneDataset", (Hub,), {"files": files, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", handler.asked
    finally:
        server.shutdown()
        server.server_close()


#: The address of the hub is read at import, so each test asks in a process of its own.
CLIENT = """
import json, sys
from artemis_vlm.errors import RunError
from pipelines.shards import find_shards, open_rows
found = {}
for uri in sys.argv[1:]:
    try:
        shards = find_shards(uri)
        with open_rows(shards[0]) as rows:
            first = rows[0]
        found[uri] = {"shards": [[s.name, s.uri] for s in shards], "uid": first.uid, "text": first.text.decode()}
    except RunError as error:
        found[uri] = {"error": str(error)}
print(json.dumps(found))
"""


def ask(hub_url: str, home: Path, *uris: str) -> Any:
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub_url,
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        LIGHT: "1",
    }
    done = subprocess.run([sys.executable, "-c", CLIENT, *uris], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_hub_data_is_found_at_the_commit_it_has_now(folder: Path, tmp_path: Path) -> None:
    shards = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    files = {f"train/{name}": content for name, content in shards.items()} | {"test/x.tar": shards["sa_000002.tar"]}
    with hub(files) as (url, _):
        by_id, by_place = "org/name", "hf://datasets/org/name/train"
        by_revision, by_glob = "hf://datasets/org/name@v1", "hf://datasets/org/name@v1/train/*1.tar"
        missing, absent, branch = "hf://datasets/org/other", "hf://datasets/org/name/none", "hf://datasets/org/name@v9"
        found = ask(url, tmp_path, by_id, by_place, by_revision, by_glob, missing, absent, branch, "org/other")
    pinned = {rev: f"hf://datasets/org/name@{sha}" for rev, sha in SHA.items()}
    three = [[name, f"{pinned['main']}/train/{name}"] for name in shards]
    assert found[by_id] == {"shards": three, "uid": "sa_000000.tar/00000", "text": "Picture 0, "}
    assert found[by_place] == found[by_id]
    assert found[by_revision]["shards"] == [[name, f"{pinned['v1']}/train/{name}"] for name in shards]
    assert found[by_glob]["shards"] == [["sa_000001.tar", f"{pinned['v1']}/train/sa_000001.tar"]]
    assert "holds nothing" in found[absent]["error"]
    for uri in (missing, branch, "org/other"):
        assert f"the data {uri} cannot be listed" in found[uri]["error"]


def test_the_card_of_hub_data_says_which_files_are_for_training(folder: Path, tmp_path: Path) -> None:
    tar = (folder / "sa_000000.tar").read_bytes()
    card = b"---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: a/*.tar\n---\n"
    with hub({"README.md": card, "a/x.tar": tar, "b/y.tar": tar}) as (url, asked):
        found = ask(url, tmp_path, "org/name")
    assert found["org/name"]["shards"] == [["x.tar", f"hf://datasets/org/name@{SHA['main']}/a/x.tar"]]
    assert not [path for path in asked if path.endswith("y.tar")]
