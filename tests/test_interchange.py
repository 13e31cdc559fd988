"""Folders written by the published artemis-vlm 0.1.4 and by this package load in the other, with equal logits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from models import model_inputs, random_example, tiny_a3
from safetensors.torch import load_file, save_file

from artemis_vlm import ArtemisVLMForConditionalGeneration

PUBLISHED = "artemis-vlm==0.1.4"
#: Runs in a process that sees the published package: argv is the action, a model folder, inputs, an output file.
SCRIPT = """
import sys, torch, artemis_vlm
from safetensors.torch import load_file, save_file
assert artemis_vlm.__version__ == "0.1.4", artemis_vlm.__file__
action, folder, inputs, output = sys.argv[1:]
if action == "save":
    source = artemis_vlm.ArtemisVLMForConditionalGeneration.from_pretrained(folder).eval()
    with torch.no_grad():
        source.multi_modal_projector.fc1.weight.add_(0.5)
    source.save_pretrained(output)
    folder = output
model = artemis_vlm.ArtemisVLMForConditionalGeneration.from_pretrained(folder).eval()
with torch.no_grad():
    logits = model(**load_file(inputs)).logits
save_file({"logits": logits}, output if action == "read" else output + "/expected.safetensors")
"""


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The published package, installed aside from the one under test."""
    target = tmp_path_factory.mktemp("published")
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target), PUBLISHED]
    subprocess.run(install, check=True)
    return target


def run_published(published: Path, *arguments: str) -> None:
    subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments],
        check=True,
        env={**os.environ, "PYTHONPATH": str(published)},
        cwd=published,
    )


def test_ours_loads_in_theirs(published: Path, tmp_path: Path) -> None:
    model = tiny_a3()
    inputs = model_inputs(model, random_example(np.random.default_rng(0), "a", (4, 6), 5, 7))
    model.save_pretrained(tmp_path / "ours")
    save_file(inputs, tmp_path / "inputs.safetensors")
    run_published(
        published, "read", str(tmp_path / "ours"), str(tmp_path / "inputs.safetensors"), str(tmp_path / "out.safetensors")
    )
    with torch.no_grad():
        expected = model(**inputs).logits
    torch.testing.assert_close(load_file(tmp_path / "out.safetensors")["logits"], expected, atol=1e-5, rtol=1e-5)


def test_theirs_loads_in_ours(published: Path, tmp_path: Path) -> None:
    model = tiny_a3()
    inputs = model_inputs(model, random_example(np.random.default_rng(1), "a", (2, 8), 5, 7))
    model.save_pretrained(tmp_path / "seed")
    config = json.loads((tmp_path / "seed" / "config.json").read_text())
    for ours in ("image_turn_thinking", "max_images_per_turn"):  # the published package never wrote these
        del config[ours]
    (tmp_path / "seed" / "config.json").write_text(json.dumps(config))
    save_file(inputs, tmp_path / "inputs.safetensors")
    theirs = tmp_path / "theirs"
    run_published(published, "save", str(tmp_path / "seed"), str(tmp_path / "inputs.safetensors"), str(theirs))
    loaded = ArtemisVLMForConditionalGeneration.from_pretrained(theirs).eval()
    with torch.no_grad():
        logits = loaded(**inputs).logits
    torch.testing.assert_close(logits, load_file(theirs / "expected.safetensors")["logits"], atol=1e-5, rtol=1e-5)
    assert loaded.config.image_turn_thinking, "where the folder does not say, the published model's habit holds"
