"""A trained model's card says what its run left, and the hub can read it."""

from __future__ import annotations

import ast
import hashlib
import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from samples import write_shards

from artemis_vlm import graft
from pipelines import card, report
from pipelines import desk as desks
from pipelines import machine as machines
from pipelines.align import Alignment
from pipelines.card import model_card
from pipelines.checkpoint import CheckpointStore
from pipelines.data import first_examples
from pipelines.desk import Desk, claim
from pipelines.inputs import find_data, find_parts
from pipelines.recipe import DEMO, TrainConfig
from pipelines.report import duration
from pipelines.storage import RunFolder

TOWER, DECODER = "hf://Qwen/Qwen3-VL-2B-Instruct@89644892e4d8", "/home/someone/secret/a2"


def made(**config: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    # of its own, so that the demo's may change
    recipe = {"batch_size": 4, "learning_rate": 3e-3, "max_steps": 152}
    fields = {"tower": "t", "decoder": "d", "data": "hf://datasets/BLIP3o/Long@abc/sa", "output": "s3://x/my-a3/"}
    values = TrainConfig(**asdict(DEMO) | recipe | fields | config)
    data = {"shards": 3, "names": "f" * 64, "commit": "c0ffee"}
    run = {
        "started": "2026-11-24T12:00:00+00:00",
        "finished": "2026-11-25T14:03:00+00:00",
        "machine": {"device": "NVIDIA GB10", "dtype": "bfloat16", "workers": 2, "versions": {"torch": "2.13.0"}},
        "fingerprint": values.fingerprint(),
        "data": data,
        "eval_data": data,
        "config": asdict(values),
        "sources": {"vision_tower": TOWER, "decoder": DECODER},
    }
    records = [{"step": 0, "eval_loss": 5.5491}]
    records += [{"step": n, "loss": 1.0, "samples_per_s": 2.0, "used": 4 * n, "quarantined": n // 2} for n in (1, 2, 3)]
    records[-1]["eval_loss"] = 0.60058
    return run, records


def rows(text: str) -> dict[str, list[str]]:
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return {row[0]: row[1:] for row in cells}


def test_the_card_says_what_the_run_holds() -> None:
    run, records = made()
    text = model_card(run, records, "ab" * 32)
    told = rows(text)
    config = run["config"]
    assert told["steps"] == [f"{run['fingerprint']['steps']} of {config['batch_size']} samples"]
    assert told["samples used; quarantined as unusable"] == ["12; 1"]
    assert told["learning rate"] == ["0.003, warm-up over 5% of the steps, cosine to 0"]
    assert told["computed in"][0].startswith("bfloat16")
    assert told["prompt"] == [config["prompt"]]
    assert [told["0"], told["3"]] == [["0%", "5.5491"], ["2%", "0.6006"]]
    assert told["hardware"] == ["2 x NVIDIA GB10"]
    assert told["wall clock, pauses and evaluations included"] == ["26 h 3 min"]
    assert told["time in training steps"] == ["0 min 6 s, 2.00 samples/s"]
    assert told["vision tower"] == ["Qwen/Qwen3-VL-2B-Instruct", "89644892e4d8"]
    assert told["decoder"] == ["a2", ""]
    assert told["data"] == ["BLIP3o/Long", "c0ffee"]
    assert told["versions"] == ["torch 2.13.0"]
    assert "ab" * 32 in text
    assert "/home" not in text
    assert "secret" not in text


def test_the_hub_reads_its_front_matter() -> None:
    run, records = made()
    read = ModelCard(model_card(run, records, "ab" * 32)).data
    assert read.library_name == "transformers"
    assert read.pipeline_tag == "image-text-to-text"
    assert read.base_model == ["Qwen/Qwen3-VL-2B-Instruct"]
    assert read.datasets == ["BLIP3o/Long"]
    (result,) = read.eval_results
    assert (result.dataset_type, result.metric_type, result.metric_value) == ("BLIP3o/Long", "loss", 0.6006)
    assert read.model_name == "my-a3"


def test_local_data_and_a_projector_alone(tmp_path: Path) -> None:
    run, records = made(export="projector", data=str(tmp_path), eval_data="s3://bucket/held-out")
    run["data"] = run["data"] | {"commit": None}
    text = model_card(run, records, "ab" * 32)
    assert rows(text)["data"] == [tmp_path.name, "3 shards, names sha256 ffffffffffffffff"]
    assert rows(text)["eval data"][0] == "s3://bucket/held-out"
    assert "graft.py build --vision Qwen/Qwen3-VL-2B-Instruct --text a2 --projector ." in text
    assert ModelCard(text).data.datasets is None


def test_its_lines_are_python() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", model_card(*made(), "x"), re.DOTALL)
    ast.parse(code)


def test_durations_and_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    assert duration(130 * 3600 + 54 * 60 + 7) == "130 h 54 min"
    assert duration(872.4) == "14 min 32 s"
    monkeypatch.setattr(machines, "PACKAGES", ("torch", "no-such-package"))
    found = machines.machine("cpu", dtype="float32", workers=1)
    assert json.loads(json.dumps(found)) == found
    assert "cores of" in found["device"]
    assert found["versions"].keys() == {"python", "torch"}


def test_a_run_ends_with_the_card_of_what_it_recorded(
    sources: graft.Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_shards(tmp_path / "data", shards=2, rows=4)
    config = TrainConfig(
        tower=str(sources.tower), decoder=str(sources.decoder), data=str(data), output=str(tmp_path / "run"),
        samples=8, held_out=2, batch_size=2, dtype="float32", captions=0,
    )  # fmt: skip
    parts = find_parts(config)
    output = RunFolder(config.output)
    found = find_data(config, None)
    claim(output, config, parts, found, "first")
    began = json.loads((output.path / "run.json").read_text())["started"]
    claim(output, config, parts, found, "me")
    model = graft.load_frozen(parts.sources, torch.float32)
    alignment = Alignment(model, parts.spec, config)
    store = CheckpointStore(f"{config.output}/checkpoints")
    monkeypatch.setattr(desks, "caption", lambda _model, _tokenizer, shown, _spec: [f"I see {e.uid}" for e in shown])
    shown = first_examples(found.evaluated, parts.encoder(config), 3)
    of_desk = shown[:2]
    desk = Desk(
        config, parts, alignment, store, lambda: of_desk, owner="me", on_saved=lambda: None, on_error=lambda: None
    )  # fmt: skip
    desk.record({"step": 0, "eval_loss": 2.5, "quarantined_now": [["a/b.tar/./train/0007", "the caption is empty"]]})
    desk.record({"step": 3, "loss": 2.0, "samples_per_s": 4.0, "used": 6, "quarantined": 0, "eval_loss": 1.25})
    of_desk = shown[1:]  # the run was continued with other --captions
    desk.finish()
    desk.close()
    row = json.loads((output.path / "quarantine.jsonl").read_text())
    assert (row["shard"], row["key"]) == ("a/b.tar", "./train/0007")
    captions = json.loads((output.path / "captions.json").read_text())
    seen = [f"I see {e.uid}" for e in shown]
    assert [(row["before"], row["after"]) for row in captions] == [(seen[1], seen[1]), ("", seen[2])]
    assert all(text in (output.path / "report.html").read_text() for text in seen[1:])
    assert f"  before  {seen[1]}\n  after   {seen[1]}\n\n" in report.summary(output.path, config)
    run = json.loads((output.path / "run.json").read_text())
    text = (output.path / "a3" / card.CARD_FILE).read_text()
    told = rows(text)
    assert (run["started"], run["owner"]) == (began, "me")
    assert told["started, finished"] == [f"{began}, {run['finished']}"]
    assert told["hardware"] == [run["machine"]["device"]]
    assert told["computed in"][0].startswith("float32")
    assert [told["0"][1], told["3"][1]] == ["2.5000", "1.2500"]
    assert hashlib.sha256((output.path / "a3" / "manifest.json").read_bytes()).hexdigest() in text
    assert ModelCard.load(output.path / "a3" / card.CARD_FILE).data.eval_results[0].metric_value == 1.25
