"""Twenty kills of captioning, on a local disk and on S3: `make soak`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import s3
from test_caption import kill_and_continue, rows_of, write_input

from pipelines import bench_caption, parts
from pipelines.caption_stages import CaptionConfig

ROWS = 1600


@pytest.fixture
def bucket() -> Iterator[Mapping[str, str]]:
    with s3.bucket("captions") as env:
        yield env


def test_twenty_kills(a3: Path, tmp_path: Path, bucket: Mapping[str, str]) -> None:
    """Ten on each: nothing missing, nothing twice, the poison listed, the same manifest as a clean run."""
    # small images travel a shard at a time: kills fall between parts only where shards are many
    pictures = write_input(tmp_path / "in", shards=ROWS // 50, rows=50)
    config = CaptionConfig(
        model=str(a3), input=str(pictures), output=str(tmp_path / "clean"), max_tokens=48, dtype="float32", part_rows=10
    )
    clean = bench_caption.in_process(replace(config, threads=1))
    assert (clean["rows"], clean["failed"]) == (ROWS, ROWS // 100)
    for number, output in enumerate((str(tmp_path / "out"), "s3://captions/out")):
        job = replace(config, output=output, slots=5 + number, threads=1)
        there = kill_and_continue(job, 10, number, tmp_path / f"log{number}", bucket, total=ROWS // 10)
        assert sum(n < ROWS // 10 for n in there) >= 8, "most kills fall within the run"
        assert json.loads(parts.Store(output).read(["_SUCCESS"])["_SUCCESS"]) == clean
        rows = rows_of(output)
        assert len({(r.shard, r.key) for r in rows}) == len(rows) == ROWS
        assert sum(r.error is not None for r in rows) == ROWS // 100
        print(f"\n{output}: killed with {there} of {ROWS // 10} parts written; the manifest of a clean run")
