"""What every test needs: quiet, offline, and small things made once."""

from __future__ import annotations

import json
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from models import SPEC, tiny_a3
from safetensors.torch import save_file
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from artemis_vlm import ImageSpec, graft

VOCABULARY = 131072


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    """The demo's: A-series layout on Mistral's Tekken vocabulary."""
    from demo import assets

    return AutoTokenizer.from_pretrained(assets.tokenizer())


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase) -> graft.Sources:
    """Tiny, in the shape of the real: a Qwen3-VL checkpoint (`model.visual.*` among others), a decoder in two shards."""
    root = tmp_path_factory.mktemp("sources")
    a3 = tiny_a3(vocab_size=VOCABULARY, hidden_size=32, head_dim=8).to(torch.bfloat16)
    tower = root / "tower"
    tower.mkdir()
    tensors = {f"model.visual.{k}": v.contiguous() for k, v in a3.visual.state_dict().items()}
    save_file(tensors | {"model.language_model.norm.weight": torch.ones(4)}, tower / "model.safetensors")
    vision = a3.config.vision_config.to_dict()
    (tower / "config.json").write_text(json.dumps({"model_type": "qwen3_vl", "vision_config": vision}))
    ImageSpec(min_pixels=65536, max_pixels=16777216).save(tower)
    a3.language_model.save_pretrained(root / "decoder", max_shard_size="6MB")
    assert (root / "decoder" / graft.INDEX_FILE).exists()
    tokenizer.save_pretrained(root / "decoder")
    return graft.Sources(root / "tower", root / "decoder")


@pytest.fixture(scope="session")
def a3(sources: graft.Sources, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole A3 folder in several shards. Not to be written to."""
    folder = tmp_path_factory.mktemp("a3")
    model = graft.load_frozen(sources, torch.bfloat16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graft, "SHARD_BYTES", 6_000_000)
        graft.write_model(folder, sources, model.multi_modal_projector.state_dict(), SPEC)
    return folder
