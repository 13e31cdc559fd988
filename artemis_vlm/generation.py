"""Greedy captions of a batch of encoded examples with plain `generate`: the reference that engines are compared with."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from artemis_vlm.examples import Example
from artemis_vlm.frozen import unpacked_attention
from artemis_vlm.image import ImageSpec
from artemis_vlm.modeling import ArtemisVLMForConditionalGeneration, normalize


@torch.no_grad()
def caption(
    model: ArtemisVLMForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    spec: ImageSpec,
    max_new_tokens: int = 96,
) -> list[str]:
    """The model's own continuation of each example's prompt, greedy, as text without special tokens."""
    if not examples:
        return []
    device = model.multi_modal_projector.fc1.weight.device
    longest = max(e.n_prompt for e in examples)
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    ids = np.full((len(examples), longest), pad, np.int64)
    mask = np.zeros_like(ids)
    for row, example in enumerate(examples):
        ids[row, longest - example.n_prompt :] = example.input_ids[: example.n_prompt]
        mask[row, longest - example.n_prompt :] = 1
    images = [e for e in examples if e.grid[0]]
    inputs = {}
    if images:
        patches = torch.from_numpy(np.concatenate([e.patches for e in images])).to(device)
        grid = torch.tensor([(1, *e.grid) for e in images], device=device)
        inputs = {"pixel_values": normalize(patches, spec), "image_grid_thw": grid}
    with unpacked_attention(model.visual, model.language_model):
        output = model.generate(
            input_ids=torch.from_numpy(ids).to(device),
            attention_mask=torch.from_numpy(mask).to(device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=pad,
            **inputs,
        )
    texts: list[str] = tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True)
    return [text.strip() for text in texts]
