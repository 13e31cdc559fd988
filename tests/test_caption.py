"""Captioning: inputs, parts and manifests, the stages without Ray, and the whole job on Ray, killed and continued."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3
from datasets import load_dataset
from PIL import Image
from samples import caption_encoder, jpeg, write_tar
from transformers import PreTrainedTokenizerBase

from artemis_vlm import RunError, chat, graft
from artemis_vlm.image import ImageSpec, decode_image, patchify
from jobs.caption import main
from pipelines import bench_caption, caption, caption_stages, data, fetch, parts, pictures
from pipelines.caption_stages import CaptionConfig, engine_config
from pipelines.parts import CaptionRow, Layout, Output
from pipelines.shards import find_shards, open_rows
from pipelines.storage import is_inside

ROOT = Path(__file__).parent.parent
NEW = 12
POISON = b"\xff\xd8 this is no image"


def write_input(folder: Path, shards: int = 3, rows: int = 25, poison: int = 100) -> Path:
    """WebDataset shards without captions; every `poison`-th image is none."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        numbers = range(shard * rows, (shard + 1) * rows)
        images = [POISON if n % poison == 7 else jpeg(n, 32 + 16 * (n % 4), 48) for n in numbers]
        write_tar(folder / f"sa_{shard:06d}.tar", [(f"{n:05d}", {"jpg": i}) for n, i in zip(numbers, images)])
    return folder


@pytest.fixture(scope="module")
def pictures_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_input(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def base(a3: Path, pictures_folder: Path) -> CaptionConfig:
    return CaptionConfig(
        model=str(a3),
        input=str(pictures_folder),
        output="",
        max_tokens=NEW,
        dtype="float32",
        part_rows=10,
        threads=1,
        slots=4,
    )


@pytest.fixture(scope="module")
def clean(base: CaptionConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[CaptionConfig, dict[str, Any]]:
    """Everything captioned without Ray."""
    config = replace(base, output=str(tmp_path_factory.mktemp("clean") / "out"))
    return config, bench_caption.in_process(config)


def rows_of(output: str, suffix: str = "parquet") -> list[CaptionRow]:
    found = Output(output, Layout([], suffix, 1))
    return [row for part in sorted(found.notes) for row, _ in found.rows(part)]


def test_every_row_is_there_once_and_the_poison_is_listed(
    clean: tuple[CaptionConfig, dict[str, Any]], a3: Path, pictures_folder: Path
) -> None:
    config, manifest = clean
    rows = rows_of(config.output)
    assert [(r.shard, r.key) for r in rows] == [(f"sa_{n // 25:06d}.tar", f"{n:05d}") for n in range(75)]
    assert [r.key for r in rows if r.error] == ["00007"]
    assert (manifest["rows"], manifest["failed"]) == (75, 1)
    assert list(manifest["errors"]) == [rows[7].error]
    assert rows[7].caption is None
    assert rows[7].finish_reason is None
    good = [r for r in rows if not r.error]
    assert {r.finish_reason for r in good} <= {"stop", "length"}
    assert all(r.caption_tokens <= NEW and r.image_tokens < r.prompt_tokens for r in good)
    assert manifest["caption_tokens"] == sum(r.caption_tokens for r in rows)
    assert len({r.caption for r in good}) > 40, "captions follow the image"
    assert {r.prompt for r in rows} == {config.prompt}
    assert manifest["run"]["model"]["frozen"] == hashlib.sha256((a3 / graft.MANIFEST_FILE).read_bytes()).hexdigest()
    for name, part in manifest["parts"].items():
        found = [row for row, _ in Output(config.output, Layout([], "parquet", 1)).rows(name)]
        assert (len(found), parts.content_hash(found)) == (part["rows"], part["sha256"])


def test_captions_are_those_of_plain_generate(clean: tuple[CaptionConfig, dict[str, Any]], pictures_folder: Path) -> None:
    config, _ = clean
    _, job = caption.prepare(config)
    loop = bench_caption.PlainLoop(job)
    rows = rows_of(config.output)
    with pictures.open_pictures(pictures.find_pictures(config.input, 10)[1]) as shard:
        for row, picture in zip(rows[25:29], shard.read(range(4))):
            assert loop.caption(picture.image) == row.caption


def test_pandas_and_datasets_read_it(clean: tuple[CaptionConfig, dict[str, Any]], tmp_path: Path) -> None:
    output = clean[0].output
    assert len(pandas.read_parquet(output)) == 75
    loaded = load_dataset(output, split="train", cache_dir=str(tmp_path))
    assert loaded.num_rows == 75
    assert loaded.column_names == parts.SCHEMA.names


def test_other_batches_and_parts_left_out_give_the_same(
    base: CaptionConfig, clean: tuple[CaptionConfig, dict[str, Any]], tmp_path: Path
) -> None:
    config = replace(base, output=str(tmp_path), slots=7)
    output, job = caption.prepare(config)
    some = replace(job, work=[replace(job.work[1], skip=frozenset({0, 2}))])
    caption.collect(some, output, bench_caption.tables(some))
    assert list(output.notes) == ["sa_000001-00001-of-00003.parquet"]
    before = (tmp_path / "sa_000001-00001-of-00003.parquet").stat().st_mtime_ns
    (tmp_path / ".sa_000002-00000-of-00003.parquet-writing").write_bytes(b"killed here")
    (tmp_path / "sa_000000-00000-of-00003.parquet").write_bytes(b"killed between the part and its note")
    assert bench_caption.in_process(config) == clean[1]
    assert (tmp_path / "sa_000001-00001-of-00003.parquet").stat().st_mtime_ns == before, "not written again"


def test_another_run_in_the_same_output_is_refused(
    clean: tuple[CaptionConfig, dict[str, Any]], a3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, manifest = clean
    with pytest.raises(
        RunError, match=r"holds captions with another prompt \(Describe .*, now Why\?\); give the same prompt"
    ):
        caption.run(replace(config, prompt="Why?"))
    with pytest.raises(RunError, match="another max_tokens"):
        caption.run(replace(config, max_tokens=13))
    with pytest.raises(RunError, match=r"another quantization \(none, now fp8\)"):
        caption.run(replace(config, quantization="fp8"))
    fp8 = replace(config, output=str(tmp_path / "fp8"), quantization="fp8")
    caption.prepare(fp8)
    with pytest.raises(RunError, match=r"another quantization \(fp8, now none\)"):
        caption.prepare(replace(fp8, quantization="none"))
    other = tmp_path / "other"
    other.mkdir()
    for file in a3.iterdir():
        (other / file.name).symlink_to(file)
    (other / "preprocessor_config.json").unlink()
    ImageSpec(max_pixels=40_000).save(other)
    with pytest.raises(RunError, match="another model"):
        caption.run(replace(config, model=str(other)))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x.parquet").touch()
    with pytest.raises(RunError, match="holds data that no captioning wrote"):
        caption.run(replace(config, output=str(tmp_path / "full")))
    assert caption.run(config) == manifest
    assert "is complete: 75 rows, 1 without a caption" in capsys.readouterr().out


def test_the_slots_are_long_enough_for_narrow_images(base: CaptionConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    frame = chat.CaptionFrame.build(tokenizer, base.prompt, False)
    for size in ((2000, 10), (10, 2000), (64, 64)):
        spec = ImageSpec(max_pixels=64 * 64)
        tokens = spec.tokens(patchify(Image.new("RGB", size), spec).grid)
        assert engine_config(base, spec, frame).max_length >= len(frame.prompt(tokens)) + base.max_tokens


def test_an_output_of_an_unknown_kind_is_told_in_a_sentence() -> None:
    with pytest.raises(RunError, match=r"foo://runs/a cannot be reached: .*; expected a folder, an s3:// URI"):
        Output("foo://runs/a", Layout([], "parquet", 1))


@pytest.mark.parametrize(
    ("folder", "output"),
    [("in", "in"), ("in/", "in/out"), ("in", "beside/../in/out"), ("in", "file://{}/in/out"), ("in", "link/out"),
     ("s3://b/in", "s3://b/in/"), ("s3://b", "s3://b/x/out")],
)  # fmt: skip
def test_an_output_inside_the_input_is_refused(
    base: CaptionConfig, folder: str, output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("in").mkdir()
    Path("link").symlink_to("in")
    with pytest.raises(RunError, match=r"lies inside the input .*; choose a folder beside it"):
        caption.prepare(replace(base, model="none", input=folder, output=output.format(tmp_path)))
    for beside in ("in-captioned", "s3://b/in-captioned", "in/../out"):
        assert not is_inside(beside, "in")
        assert not is_inside(beside, "s3://b/in")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--max-tokens 0", "max_tokens is 0; it must be at least 1"),
        ("--engine.min-size 2", "a pool has 2 to 1 actors"),
        ("--encode.num-gpus -1", "expected 0 or more"),
        ("--threads -1", "threads is -1"),
        ("--gpu-memory 2", "gpu_memory is 2.0"),
        ("--fetch.timeout-s 0", "must be above 0"),
        ("--max-pixels 10", "max_pixels is 10; it must reach"),
        ("--device gpu", "device is gpu; expected cpu or cuda"),
        ("--device cuda:99", "device is cuda:99, of which torch finds "),
        ("--engine-kind vllm", "the engine is vllm, which is not installed here"),
        ("--output /proc/x", "the output /proc/x cannot be written: No such file or directory"),
        ("--output {model}/config.json", "cannot be written: "),
    ],
)
def test_bad_options_are_one_sentence_before_any_work(
    base: CaptionConfig,
    flags: str,
    says: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(caption, "engine_kind", lambda *_: "transformers")
    monkeypatch.setattr(caption, "collect", lambda *_: pytest.fail("it has begun"))
    line = ["--model", base.model, "--input", base.input, "--output", str(tmp_path / "out")]
    assert main([*line, *flags.format(model=base.model).split()]) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n"), err.startswith("error: ")) == ("", 1, True), err
    assert says in err


def test_webdataset_out_is_training_data(
    base: CaptionConfig, clean: tuple[CaptionConfig, dict[str, Any]], tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """The recaptioning loop: what came with the image stays, and training reads the new caption."""
    samples = [(f"deep/{n:03d}", {"jpg": jpeg(n), "txt": f"old {n}", "json": "{}"}) for n in range(5)]
    samples.append(("deep/bad", {"jpg": POISON, "txt": "old"}))
    write_tar(tmp_path / "in.tar", samples)
    config = replace(base, input=str(tmp_path / "in.tar"), output=str(tmp_path / "out"), format="webdataset", part_rows=4)
    bench_caption.in_process(config)
    rows = rows_of(config.output, "tar")
    assert [r.key for r in rows] == [key for key, _ in samples]
    with tarfile.open(tmp_path / "out" / "in-00000-of-00002.tar") as archive:
        names = archive.getnames()
        assert names[:5] == [f"deep/000.{e}" for e in ("jpg", "txt", "json", "caption.txt", "caption.json")]
        assert archive.extractfile("deep/000.jpg").read() == samples[0][1]["jpg"]
        assert json.loads(archive.extractfile("deep/001.caption.json").read())["caption"] == rows[1].caption

    shards = find_shards(config.output)
    read = []
    for shard in shards:
        with open_rows(shard) as found:
            read += [found[i] for i in range(len(found))]
    assert [r.text.decode() for r in read[:5]] == [r.caption for r in rows[:5]]
    assert [r.image for r in read] == [files["jpg"] for _, files in samples]
    encoder = caption_encoder(tokenizer)
    with open_rows(shards[0]) as found:
        assert encoder.candidate(data.Position(), found[0]).example is not None
    again = replace(config, input=config.output, output=str(tmp_path / "again"))
    bench_caption.in_process(again)
    assert [r.caption for r in rows_of(again.output, "tar")] == [r.caption for r in rows]
    with tarfile.open(next((tmp_path / "again").glob("in-00000-of-00002-*.tar"))) as archive:
        assert archive.getnames().count("deep/000.caption.txt") == 1


def test_plain_files_tables_and_urls(
    base: CaptionConfig, tmp_path: Path, server: Mapping[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "files"
    (folder / "deep").mkdir(parents=True)
    for n in range(3):
        (folder / "deep" / f"{n}.jpg").write_bytes(jpeg(n))
    Image.new("RGB", (40, 40)).save(folder / "a.gif")
    (folder / "b.png").write_bytes(b"no image")
    (folder / "notes.txt").write_text("no image either")
    config = replace(base, input=str(folder), output=str(tmp_path / "1"), part_rows=2, format="webdataset")
    manifest = bench_caption.in_process(config)
    assert (manifest["rows"], manifest["failed"]) == (5, 1)
    rows = rows_of(config.output, "tar")
    assert [r.key for r in rows] == ["a.gif", "b.png", "deep/0.jpg", "deep/1.jpg", "deep/2.jpg"]
    with open_rows(find_shards(config.output)[0]) as found:
        assert (found[0].image, found[0].error) == ((folder / "a.gif").read_bytes(), "")

    images = [{"bytes": jpeg(0), "path": None}, {"bytes": None, "path": None}]
    pq.write_table(pa.table({"image": images}), tmp_path / "t.parquet")
    config = replace(base, input=str(tmp_path / "t.parquet"), output=str(tmp_path / "2"))
    assert bench_caption.in_process(config)["errors"] == {"the row has no image bytes and no URL": 1}
    assert rows_of(config.output)[0].caption == rows[2].caption

    urls = [server["jpeg"], server["missing"], "http://127.0.0.1/x.jpg", server["jpeg"]]
    pq.write_table(pa.table({"url": urls}), tmp_path / "u.parquet")
    config = replace(base, input=str(tmp_path / "u.parquet"), output=str(tmp_path / "3"))
    bench_caption.in_process(config)
    found = rows_of(config.output)
    assert [r.caption for r in found] == [rows[2].caption, None, None, rows[2].caption]
    assert [r.error for r in found[1:3]] == [
        "the image URL answered with status 404",
        "the image URL's host 127.0.0.1 is not a public web server",
    ]
    (output, _), page = caption.prepare(config), tmp_path / "3" / caption.PAGE_FILE
    caption.write_page(config, output)
    assert page.read_text().count("<img") == 2
    pq.write_table(pa.table({"url": urls[:2]}), tmp_path / "u.parquet")
    for says in ("the shard u.parquet now has 2 rows", "does not exist"):  # which is no reason not to finish
        caption.write_page(config, output)
        assert f"{caption.PAGE_FILE} shows no images: " in caplog.text
        assert says in caplog.text
        assert (page.read_text().count("<img"), page.read_text().count("u.parquet")) == (0, 4)
        (tmp_path / "u.parquet").unlink(missing_ok=True)
    (tmp_path / "files" / "x.tar").touch()
    with pytest.raises(RunError, match="both shards and 5 plain image files"):
        pictures.find_pictures(str(folder), 2)


def test_files_whose_names_are_not_text(base: CaptionConfig, tmp_path: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    for n, name in enumerate((b"caf\xe9.jpg", "caf\u00e9.jpg".encode(), b"gone\xff.jpg")):
        Path(os.fsdecode(os.fsencode(folder) + b"/" + name)).write_bytes(jpeg(n))
    _, job = caption.prepare(replace(base, input=str(folder), output=str(tmp_path / "out")))
    Path(os.fsdecode(os.fsencode(folder) + b"/gone\xff.jpg")).unlink()
    (block,) = caption_stages.read_blocks(job.work[0], 10, "parquet")
    found = {row["key"]: (row["image"], row["error"]) for row in block.to_pylist()}
    assert found == {
        "caf\\xe9.jpg": (jpeg(0), None),
        "caf\u00e9.jpg": (jpeg(1), None),
        "gone\\xff.jpg": (b"", "the file gone\\xff.jpg is gone"),
    }


def test_urls_are_fetched_and_decoded_a_few_at_a_time(
    base: CaptionConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However Ray joins the blocks; and the first captions do not wait for the last URL."""
    pq.write_table(pa.table({"url": [f"http://example.org/{n}.jpg" for n in range(700)]}), tmp_path / "u.parquet")
    _, job = caption.prepare(replace(base, input=str(tmp_path / "u.parquet"), output=str(tmp_path / "out")))
    blocks = list(caption_stages.read_blocks(job.work[0], 10, "parquet"))
    assert [len(block) for block in blocks] == [256, 256, 188]
    fetched: list[str] = []
    decoded: list[bytes] = []

    class Fake:
        def __init__(self, _: fetch.FetchConfig) -> None: ...

        async def fetch(self, url: str) -> bytes:
            fetched.append(url)
            return jpeg(0, 64, 64)

    def decode(data: bytes) -> Image.Image:
        decoded.append(data)
        return decode_image(data)

    monkeypatch.setattr(caption_stages, "Fetcher", Fake)
    monkeypatch.setattr(caption_stages, "decode_image", decode)
    monkeypatch.setattr(caption_stages, "SORTED_BYTES", 20 * 64 * 64 * 3)
    left = 0
    for table in caption_stages.Decode(job)(pa.concat_tables(blocks)):
        assert len(fetched) <= left + 256
        assert len(decoded) <= left + 20
        left += len(table)
    assert left == len(decoded) == len(fetched) == 700


def test_remote_files_whose_names_are_patterns() -> None:
    files = fsspec.filesystem("memory")
    for name in ("a[1].jpg", "b[2].jpg"):
        files.pipe_file(f"/pictures/{name}", name.encode())
    (shard,) = pictures.find_pictures("memory://pictures", 10)
    files.rm_file("/pictures/b[2].jpg")
    with pictures.open_pictures(shard) as found:
        assert [(p.key, p.image, p.error) for p in found.read(range(2))] == [
            ("a[1].jpg", b"a[1].jpg", ""),
            ("b[2].jpg", b"", "the file b[2].jpg is gone"),
        ]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Mapping[str, str]]:
    """A web server whose name seems public: the check of addresses is the real one, the dialling is led here."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/0.jpg" else 404)
            self.send_header("Content-Type", "image/jpeg")
            self.end_headers()
            self.wfile.write(jpeg(0))

        def log_message(self, *_: Any) -> None: ...

    async def resolve(host: str, port: int) -> list[str]:
        return ["93.184.216.34"] if host == "pictures.example.org" else [host]

    async def dial(address: str, port: int, tls: Any, host: str) -> Any:
        return await asyncio.open_connection("127.0.0.1", web.server_port)

    monkeypatch.setattr(fetch, "system_resolve", resolve)
    monkeypatch.setattr(fetch, "system_dial", dial)
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        base = "http://pictures.example.org"
        yield {"jpeg": f"{base}/0.jpg", "missing": f"{base}/1.jpg"}
        web.shutdown()


def test_a_shard_that_cannot_be_read_stops_no_other(
    base: CaptionConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor do names that are patterns elsewhere."""
    folder = tmp_path / "in"
    folder.mkdir()
    write_tar(folder / "a[1].tar", [(f"{n}", {"jpg": jpeg(n)}) for n in range(3)])
    (folder / "b.parquet").write_bytes(b"no table")
    write_tar(folder / "c.tar", [])
    write_tar(folder / "d.tar", [("0", {"": jpeg(0)})])
    config = replace(base, input=str(folder), output=str(tmp_path / "out[1]*?"))
    with pytest.raises(RunError, match=r"1 of 4 shards could not be read, b\.parquet among .*run the same command again"):
        bench_caption.in_process(config)
    assert not (tmp_path / "out[1]*?" / "_SUCCESS").exists()
    assert len(rows_of(config.output)) == 4
    assert "4 of about 5 rows" in capsys.readouterr().out.splitlines()[-1], "an empty shard is known"
    pq.write_table(pa.table({"image": [jpeg(9)]}), folder / "b.parquet")
    manifest = bench_caption.in_process(config)
    assert manifest["errors"] == {"the sample has 0 images: found a file without an extension, expected one": 1}
    assert {part: p["rows"] for part, p in manifest["parts"].items()} == {
        "a[1]-00000-of-00001.parquet": 3,
        "b-00000-of-00001.parquet": 1,
        "c-00000-of-00001.parquet": 0,
        "d-00000-of-00001.parquet": 1,
    }


def test_a_shard_that_changed_is_refused(base: CaptionConfig, tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [(f"{n}", {"jpg": jpeg(n)}) for n in range(3)])
    config = replace(base, input=str(tmp_path / "a.tar"), output=str(tmp_path / "out"), part_rows=2)
    output, job = caption.prepare(config)
    some = replace(job, work=[replace(job.work[0], skip=frozenset({1}))])
    caption.collect(some, output, bench_caption.tables(some))
    write_tar(tmp_path / "a.tar", [(f"{n}", {"jpg": jpeg(n)}) for n in range(5)])
    with pytest.raises(RunError, match=r"a\.tar now has 5 rows, which are 3 parts of this output; it began with 2"):
        bench_caption.in_process(config)


def test_seeds_draw_the_same_captions_again(base: CaptionConfig, tmp_path: Path, pictures_folder: Path) -> None:
    config = replace(base, input=str(pictures_folder / "sa_000000.tar"), temperature=1.0, seed=3)
    hashes = [
        bench_caption.in_process(replace(config, output=str(tmp_path / str(n)), slots=slots))["sha256"]
        for n, slots in enumerate((3, 8))
    ]
    other = bench_caption.in_process(replace(config, output=str(tmp_path / "other"), seed=4))["sha256"]
    assert hashes[0] == hashes[1] != other


# --- on Ray ----------------------------------------------------------------------------------------------------------


def command(config: CaptionConfig) -> list[str]:
    flags = {
        name: getattr(config, name)
        for name in ("model", "input", "output", "max_tokens", "dtype", "part_rows", "threads", "slots", "format")
    }
    line = [sys.executable, str(ROOT / "jobs" / "caption.py")]
    return line + [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", str(value))]


class Tree:
    """A job with all the processes that it starts, found by a mark in their environment."""

    def __init__(self, config: CaptionConfig, log: Path, env: Mapping[str, str]) -> None:
        self.mark = f"{os.getpid()}-{time.monotonic_ns()}"
        self.log = log
        env = {**os.environ, **env, "A3_TEST_TREE": self.mark}
        with log.open("ab") as out:
            self.process = subprocess.Popen(command(config), env=env, stdout=out, stderr=subprocess.STDOUT, cwd="/")

    def pids(self) -> list[int]:
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if f"A3_TEST_TREE={self.mark}".encode() in (process / "environ").read_bytes():
                    found.append(int(process.name))
            except OSError:  # gone meanwhile
                continue
        return found

    def kill(self) -> None:
        """kill -9 of everything."""
        while pids := self.pids():
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.process.poll()
            time.sleep(0.02)
        self.process.wait()


def kill_and_continue(
    config: CaptionConfig, kills: int, seed: int, log: Path, env: Mapping[str, str], total: int = 9
) -> list[int]:
    """Kills the job at random moments, each time further on, then lets it come to its end.

    Args:
        total: parts of the whole output.

    Returns:
        How many parts there were after each kill.
    """
    dice, there = random.Random(seed), [0]
    for number in range(kills):
        enough = max(there[-1] + 1, number * (total - 1) // kills)
        job = Tree(config, log, env)
        try:
            while job.process.poll() is None and len(noted(config.output)) < enough:
                time.sleep(0.05)
            time.sleep(dice.random() * 0.1)  # parts come in bursts: all may be there within a second
        finally:
            ended = job.process.poll()
            job.kill()
        assert ended in (None, 0), log.read_text()[-3000:]
        there.append(len(noted(config.output)))
    last = Tree(config, log, env)
    try:
        assert last.process.wait(900) == 0, log.read_text()[-3000:]
    finally:
        last.kill()
    return there[1:]


def noted(output: str) -> set[str]:
    return {name for name in parts.Store(output).names() if name.startswith(f"{parts.NOTES}/")}


@pytest.fixture
def bucket() -> Iterator[Mapping[str, str]]:
    """The environment in which `s3://captions` is there."""
    with s3.bucket("captions") as env:
        yield env


def test_a_store_sees_what_others_write(bucket: Mapping[str, str]) -> None:
    """On S3, from another process: what a listing of before does not have can be read, and is listed next time."""
    store = parts.Store("s3://captions/out[1]*")
    store.write(f"{parts.NOTES}/a", "1")
    assert store.names() == {f"{parts.NOTES}/a"}
    write = "import sys; from pipelines.parts import Store; Store(sys.argv[1]).write('_SUCCESS', 'x')"
    subprocess.run([sys.executable, "-c", write, store.uri], env={**os.environ, **bucket}, cwd=ROOT, check=True)
    assert store.read(["_SUCCESS"]) == {"_SUCCESS": b"x"}
    assert store.names() == {f"{parts.NOTES}/a", "_SUCCESS"}


def test_killed_twice_on_s3_and_continued(base: CaptionConfig, bucket: Mapping[str, str], tmp_path: Path) -> None:
    pictures = write_input(tmp_path / "pictures", rows=50)
    config = replace(base, input=str(pictures), max_tokens=200, slots=6)  # work enough for the kills to fall within it
    clean = bench_caption.in_process(replace(config, output=str(tmp_path / "clean")))
    config = replace(config, output="s3://captions/out")
    there = kill_and_continue(config, 2, 1, tmp_path / "log", bucket, total=15)
    print(f"parts there after each kill: {there} of 15")
    assert there[0] < 15, "killed within the run"
    assert there[0] <= there[1] <= 15
    manifest = json.loads(parts.Store(config.output).read(["_SUCCESS"])["_SUCCESS"])
    assert manifest == clean, "as a clean run without Ray"
    rows = rows_of(config.output)
    assert len({(r.shard, r.key) for r in rows}) == len(rows) == 150
    log = (tmp_path / "log").read_text()
    assert "150 rows, 2 without a caption" in log
    assert "images/s" in log
    page = parts.Store(config.output).read(["_report.html"])["_report.html"].decode()
    assert page.count("<img") >= 8
    assert "bytes are not a readable image" in page
