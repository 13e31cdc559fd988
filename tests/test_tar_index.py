"""The index of a tar that is remembered: the samples are those of a walk, and nothing old or damaged is taken for it."""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import re
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
from samples import sample, write_tar

from artemis_vlm import LIGHT
from pipelines import tar_index
from pipelines.data import Position, Source
from pipelines.shards import RawSample, Shard, open_rows
from pipelines.tar_index import TarIndex

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where indices are remembered, of small shards too."""
    monkeypatch.setenv("ARTEMIS_VLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tar_index, "MIN_REMEMBERED", 1)
    return tmp_path / "cache" / "tar-indices"


@pytest.fixture
def walks(monkeypatch: pytest.MonkeyPatch) -> list[TarIndex]:
    """What was found by walking, in turn."""
    found: list[TarIndex] = []
    original = tar_index.walk

    def walk(*args: object) -> TarIndex:
        found.append(original(*args))  # type: ignore[arg-type]
        return found[-1]

    monkeypatch.setattr(tar_index, "walk", walk)
    return found


def settled(path: Path, seconds: int = 60) -> Path:
    """As if it had been written that long ago."""
    then = int(time.time() - seconds)
    os.utime(path, (then, then))
    return path


def rows_of(path: Path) -> list[RawSample]:
    with open_rows(Shard("a.tar", str(path))) as rows:
        return [rows[i] for i in range(len(rows))]


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    """30 samples, one of them twice, one without text, and a damaged stretch."""
    samples = [sample(n) for n in range(30)]
    path = write_tar(tmp_path / "a.tar", [*samples, sample(3), ("x", {"jpg": b"no text"})])
    content = bytearray(path.read_bytes())
    content[content.index(b"00007.txt")] ^= 1
    path.write_bytes(content)
    return settled(path)


def test_the_stream_is_the_same_with_and_without(shard: Path, cache: Path, walks: list[TarIndex]) -> None:
    def stream() -> list[tuple[Position, RawSample]]:
        turns = islice(Source([Shard("a.tar", str(shard))], 3).turns(Position()), 3)
        return [item for turn in turns for item in turn.read()]

    first, again = stream(), stream()
    assert len(walks) == 1
    (entry,) = cache.iterdir()
    entry.unlink()
    settled(shard, 0)  # too young to be remembered
    walked = stream()
    assert len(walks) == 4
    assert not list(cache.iterdir())
    assert first == again == walked
    errors = [raw.error for _, raw in first[: len(first) // 3] if raw.error]
    assert [sum(part in error for error in errors) for part in ("damaged", "twice", "not whole")] == [1, 1, 2]


def test_a_shard_that_changed_is_walked_again(shard: Path, cache: Path, walks: list[TarIndex]) -> None:
    assert len(rows_of(shard)) > 30
    settled(write_tar(shard, map(sample, range(5))))
    assert [raw.uid for raw in rows_of(shard)] == [f"a.tar/{n:05d}" for n in range(5)], "other size, the same mtime"
    size = shard.stat().st_size
    settled(write_tar(shard, [(f"new{n:02d}", sample(n)[1]) for n in range(5)]), 30)
    assert shard.stat().st_size == size
    assert [raw.uid for raw in rows_of(shard)] == [f"a.tar/new{n:02d}" for n in range(5)], "other mtime, the same size"
    assert len(walks) == 3
    assert len(rows_of(shard)) == 5
    assert len(walks) == 3
    assert len(list(cache.iterdir())) == 1, "what is old is replaced"


def test_small_shards_are_not_remembered(
    shard: Path, cache: Path, walks: list[TarIndex], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tar_index, "MIN_REMEMBERED", 100)
    assert rows_of(shard) == rows_of(shard)
    assert len(walks) == 2
    assert not cache.exists()


def test_members_of_other_kinds_are_read_or_named(tmp_path: Path) -> None:
    path = tmp_path / "kinds.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:
        for n, kind in enumerate((tarfile.REGTYPE, tarfile.CONTTYPE, tarfile.GNUTYPE_SPARSE)):
            for extension, data in sample(n)[1].items():
                member = tarfile.TarInfo(f"{n:05d}.{extension}")
                content = data.encode() if isinstance(data, str) else data
                member.size, member.type = len(content), kind
                archive.addfile(member, io.BytesIO(content))
    regular, contiguous, *sparse = rows_of(path)
    assert not regular.error
    assert not contiguous.error
    assert len(sparse) == 2
    assert all("sparse file, which is not read" in row.error for row in sparse)


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "cut": lambda content: content[: len(content) // 2],
    "end lost": lambda content: content[:-3],
    "flipped": lambda content: content[: len(content) // 2] + b"\0\1\2\3" + content[len(content) // 2 + 4 :],
    "zeros": lambda content: bytes(len(content)),
    "another checksum": lambda content: content[:-8] + b"abcd" + content[-4:],
    "no JSON": lambda _: gzip.compress(b"samples"),
    "other JSON": lambda _: gzip.compress(json.dumps([1, 2]).encode()),
    "no samples": lambda content: gzip.compress(
        json.dumps({"version": json.loads(gzip.decompress(content))["version"]}).encode()
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_named_once_and_made_anew(
    shard: Path, cache: Path, walks: list[TarIndex], damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    expected = rows_of(shard)
    (entry,) = cache.iterdir()
    whole = entry.read_bytes()
    entry.write_bytes(DAMAGES[damage](whole))
    assert rows_of(shard) == rows_of(shard) == expected
    assert len(walks) == 2
    (record,) = caplog.records
    assert f"the index of {shard} in {entry} cannot be used and is made anew: " in record.getMessage()
    assert entry.read_bytes() == whole


def test_a_cache_that_cannot_be_written_costs_time_alone(
    shard: Path, walks: list[TarIndex], tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = tmp_path / "full"
    monkeypatch.setenv("ARTEMIS_VLM_CACHE", str(full))

    def replace(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        assert rows_of(shard) == rows_of(shard)
    assert len(walks) == 2
    assert {record.getMessage().split(":")[0] for record in caplog.records} == {
        f"the index of {shard} cannot be kept in {full / 'tar-indices'}"
    }
    assert not list((full / "tar-indices").iterdir()), "nothing half written is left"


def test_what_is_remembered_is_bounded_and_the_oldest_goes(
    tmp_path: Path, cache: Path, walks: list[TarIndex], monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [settled(write_tar(tmp_path / f"{n}.tar", map(sample, range(30)))) for n in range(6)]
    rows_of(paths[0])
    (first,) = cache.iterdir()
    size = first.stat().st_size
    monkeypatch.setattr(tar_index, "MAX_REMEMBERED_BYTES", 4 * size)
    left = cache / ".writing-by-a-killed-process"
    left.write_bytes(bytes(size))
    for age, path in enumerate((left, first)):
        settled(path, 100 - age)
    for path in paths[1:]:
        rows_of(path)
    assert sum(path.stat().st_size for path in cache.iterdir()) <= 4 * size
    assert not first.exists()
    assert not left.exists()
    for path in paths[-3:]:
        rows_of(path)
    assert len(walks) == 6


def test_plain_headers_are_read_as_tarfile_reads_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(0)
    blocks = []
    for kind in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        for name in ("a.jpg", "x" * 99, "x" * 100, "folder/" * 20 + "a.txt", "\u5bb6.png", "caf\udce9.jpg"):
            member = tarfile.TarInfo(name)
            member.size, member.mtime, member.uid = rng.randrange(1 << 33), rng.randrange(1 << 31), rng.randrange(1 << 21)
            content = member.tobuf(kind, "utf-8", "surrogateescape")
            blocks += [content[at : at + 512] for at in range(0, len(content), 512)]
    for block in list(blocks):
        for _ in range(300):
            changed = bytearray(block)
            for _ in range(rng.choice([1, 2, 3])):
                changed[rng.randrange(512)] = rng.choice([0, 32, 48, 49, 55, 56, 128, 255, rng.randrange(256)])
            if rng.random() < 0.7:  # with the checksum that fits
                changed[148:156] = b" " * 8
                changed[148:156] = b"%06o\0 " % sum(changed)
            blocks.append(bytes(changed))
    quick = [tar_index._header(block) for block in blocks]
    monkeypatch.setattr(tar_index, "_NUMBERS", re.compile(rb"(?!)"))
    assert quick == [tar_index._header(block) for block in blocks]
    assert 1000 < sum(header is not None for header in quick) < len(blocks)


#: Writes and reads the same entry again and again; whatever else does so, each read must be of one whole writing.
WRITER = """
import sys
from pathlib import Path
from pipelines.tar_index import TarIndex, _remember, _remembered
path, own = Path(sys.argv[1]), sys.argv[2]
indices = {name: TarIndex({f"{name}{n}": {"jpg": [n, 1]} for n in range(1000)}) for name in "ab"}
for _ in range(50):
    _remember(path, "1", indices[own])
    found = _remembered(path, "here", "1")
    assert found in (indices["a"], indices["b"]), found
"""


def test_processes_that_write_at_once_leave_one_whole_entry(cache: Path) -> None:
    path = cache / "x.json.gz"
    command = [sys.executable, "-c", WRITER, str(path)]
    light = os.environ | {LIGHT: "1"}
    both = [subprocess.Popen([*command, own], cwd=ROOT, env=light, stderr=subprocess.PIPE, text=True) for own in "ab"]
    for process in both:
        assert process.communicate(timeout=120)[1] == ""
        assert process.returncode == 0
    assert [entry.name for entry in cache.iterdir()] == ["x.json.gz"]
