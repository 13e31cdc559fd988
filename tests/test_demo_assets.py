"""The cache: keyed by content, whole or absent, built once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import sleep

import pytest

from demo.assets import cached
from pipelines.storage import cache_folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ARTEMIS_VLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_where(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cache: Path) -> None:
    assert cache_folder() == cache
    monkeypatch.delenv("ARTEMIS_VLM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "artemis-vlm"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "artemis-vlm"


def test_a_folder_is_built_once_per_content(tmp_path: Path) -> None:
    source = tmp_path / "builder.py"
    built = []

    def build(folder: Path) -> None:
        built.append(folder)
        (folder / "file").write_text("x")

    source.write_text("1")
    first = cached("part", [source, "v1", b"\0"], build)
    assert cached("part", [source, "v1", b"\0"], build) == first
    assert len(built) == 1
    assert (first / "file").read_text() == "x"
    source.write_text("2")
    assert len({first, cached("part", [source, "v1", b"\0"], build), cached("part", ["ab", "c"], build)}) == 3
    assert cached("part", ["a", "bc"], build) != cached("part", ["ab", "c"], build)


def test_a_failed_build_leaves_nothing(cache: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        cached("part", ["v1"], fail)
    assert [path.name for path in cache.iterdir()] == ["part.lock"]


def test_two_at_once_wait_for_one_build() -> None:
    built = []

    def build(folder: Path) -> None:
        built.append(folder)
        sleep(0.2)

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: cached("part", ["v1"], build), range(2))
    assert first == second
    assert len(built) == 1
