"""The benchmarks run to their end on tiny things, and say so when a part of them fails."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from models import tiny_config

from jobs import bench
from pipelines import bench_train
from pipelines.bench_train import Mix, Settings, Shapes


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(vocab_size=1200)
    vision = {k: v for k, v in config.vision_config.to_dict().items() if k != "model_type"}
    monkeypatch.setitem(bench_train.SHAPES, "tiny", Shapes(vision, config.text_config))
    mixes = tuple(Mix(name, ((4, 4), (2, 6)), (8.0, 2.0), (4, 12)) for name in ("one", "two"))
    monkeypatch.setattr(bench_train, "MIXES", mixes)
    monkeypatch.setattr(bench_train, "TOP_ID", 1200)


def test_training_is_measured_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "figures.json"
    settings = Settings("tiny", baseline=True, profile=True, json_file=str(file), batch_size=4, steps=2)
    assert bench_train.run(settings) == 0, capsys.readouterr().out
    found = json.loads(file.read_text())
    names = [row["name"] for row in found["rows"]]
    assert names == ["published recipe", *(f"{p}, {mix}" for p in ("bf16", "fp8-backward", "fp8") for mix in ("one", "two"))]
    assert all(row["samples_per_s"] > 0 for row in found["rows"])
    assert found["failures"] == []
    printed = capsys.readouterr().out
    assert "gradient cosine" in printed
    assert "KERNEL" in printed
    assert printed.count("PART") == 12


def test_a_bare_gpu_machine_can_run_it() -> None:
    """With torch and transformers, and for training pyarrow, without Ray and what else the jobs need."""
    absent = ("ray", "tyro", "datasets", "s3fs", "mistral_common", "pyarrow")
    code = f"import sys; sys.modules.update(dict.fromkeys({absent})); import pipelines.bench_vllm; "
    code += "del sys.modules['pyarrow']; import jobs.bench, pipelines.bench_train"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent, check=True)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["train", "--steps", "0"], "'0'; expected a whole number of at least 1"),
        (["data", "--images", "-3"], "'-3'; expected a whole number of at least 1"),
        (["train", "--json", "/nowhere/x.json"], "its folder is not there, or nothing can be written in it"),
    ],
)
def test_bad_numbers_are_refused_before_anything_is_measured(
    given: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        bench.main(given)
    assert sentence in capsys.readouterr().err


def test_a_variant_that_fails_is_told_and_the_others_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(bench_train, "measure_published", broken)
    assert bench_train.run(Settings("tiny", ("bf16",), baseline=True, batch_size=2, steps=1)) == 1
    printed = capsys.readouterr()
    assert "FAILED baseline: RuntimeError: no such kernel" in printed.out
    assert printed.out.count("ROW") == 2
