"""Tiny random models, where a test needs shapes and not sense."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import AutoConfig
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig

from artemis_vlm import ArtemisVLMConfig, ArtemisVLMForConditionalGeneration, ImageSpec
from artemis_vlm.examples import Example
from artemis_vlm.modeling import normalize, repeat_frame

IMAGE_ID = 22
SPEC = ImageSpec()


def tiny_config(decoder: str = "mistral", **text: Any) -> ArtemisVLMConfig:
    """A tower with a DeepStack merger, as Qwen3-VL's has, and a decoder with grouped heads, as A2 has."""
    vision = Qwen3VLVisionConfig(
        depth=3,
        hidden_size=32,
        intermediate_size=64,
        num_heads=2,
        out_hidden_size=48,
        num_position_embeddings=64,
        deepstack_visual_indexes=[1],
    )
    fields = {
        "vocab_size": 300,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return ArtemisVLMConfig(
        vision.to_dict(), AutoConfig.for_model(decoder, **fields | text).to_dict(), image_turn_thinking=False
    )


def tiny_a3(seed: int = 0, **text: Any) -> ArtemisVLMForConditionalGeneration:
    torch.manual_seed(seed)
    model = ArtemisVLMForConditionalGeneration(tiny_config(**text))
    with torch.no_grad():  # transformers' initial weights are so small that every logit would look alike
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.15)
    return model.eval()


def random_example(rng: np.random.Generator, uid: str, grid: tuple[int, int], n_prompt_text: int, n_targets: int) -> Example:
    """A sample of random pixels and tokens; grid (0, 0) has no image."""
    n_patches = grid[0] * grid[1]
    image = [20, *[IMAGE_ID] * (n_patches // 4), 21] if n_patches else []
    text = rng.integers(100, 300, n_prompt_text + n_targets).tolist()
    ids = [1, *image, *text]
    patches = rng.integers(0, 256, (n_patches, 768), dtype=np.uint8)
    return Example(uid, np.array(ids, np.int32), len(ids) - n_targets, patches, grid)


def model_inputs(model: ArtemisVLMForConditionalGeneration, example: Example) -> dict[str, torch.Tensor]:
    """An example in the public format of Qwen2-VL's processors."""
    ids = torch.tensor(example.input_ids, dtype=torch.int64)[None]
    labels = ids.clone()
    labels[:, : example.n_prompt] = -100
    inputs = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}
    if example.grid[0]:
        pixels = normalize(torch.from_numpy(example.patches), SPEC)
        inputs["pixel_values"] = repeat_frame(pixels, SPEC.temporal_patch_size, model.visual)
        inputs["image_grid_thw"] = torch.tensor([[1, *example.grid]])
    return inputs
