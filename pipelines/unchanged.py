"""Proof that grafting eyes on a decoder left its text alone: greedy answers to prompts without images, token for token.

The decoder speaks for itself through `AutoModelForCausalLM` and its own chat template, the A3 through its processor and
its own `generate`; both in float32, one after the other.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from jinja2 import TemplateError
from transformers import AutoModelForCausalLM, AutoProcessor, PreTrainedModel

from artemis_vlm import graft
from artemis_vlm.errors import CheckpointError, RunError
from pipelines.compare import load_a3
from pipelines.machine import check_device
from pipelines.storage import fetch_model

#: Logits are equal to the bit where both run the same kernels; others may round otherwise.
LOGIT_TOLERANCE: Final = 1e-3


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Whose text is compared."""

    model: str
    """A whole A3; folder, s3:// URI or hub id."""
    decoder: str = ""
    """Its decoder alone; empty: the one that the A3's manifest names."""
    max_new_tokens: int = 64
    """Most tokens of an answer."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where both run, one after the other."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise RunError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1")
        check_device(self.device)


@dataclass(frozen=True)
class Prompt:
    """A conversation without images; `options` go to the chat template."""

    name: str
    messages: Sequence[Mapping[str, Any]]
    options: Mapping[str, Any] = field(default_factory=dict)


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


_WEATHER: Final = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
_CALL: Final = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Oslo"}}}],
}
PROMPTS: Final = (
    Prompt("a question, thinking as the template says", [_user("What is the capital of France?")]),
    Prompt("a question, thinking off", [_user("What is the capital of France?")], {"enable_thinking": False}),
    Prompt("a question, thinking on", [_user("How many minutes are in a week?")], {"enable_thinking": True}),
    Prompt("a system prompt", [{"role": "system", "content": "Answer like a pirate."}, _user("Who are you?")]),
    Prompt(
        "several turns, an earlier thought",
        [
            _user("Name a colour."),
            {"role": "assistant", "content": "<think>\nAny will do.\n</think>\n\nBlue."},
            _user("And another one?"),
        ],
    ),
    Prompt("tools on offer", [_user("What is the weather in Oslo?")], {"tools": [_WEATHER]}),
    Prompt(
        "a tool's answer",
        [_user("What is the weather in Oslo?"), _CALL, {"role": "tool", "content": '{"celsius": -3, "sky": "clear"}'}],
        {"tools": [_WEATHER], "enable_thinking": False},
    ),
    Prompt("code and other scripts", [_user("Explain `x = [i**2 for i in range(3)]` in 日本語, на русском and 🙂.")]),
)


def check_text(config: TextConfig, say: Callable[[str], None] = print, prompts: Sequence[Prompt] = PROMPTS) -> str:
    """Compares prompt ids and greedy answers.

    Returns:
        What was found equal, in a line.

    Raises:
        RunError: at the first token that differs, with prompt, place and both tokens; or logits that differ by more than
            float32's rounding explains, since not every changed weight changes a greedy token.
        CheckpointError: a model is missing or damaged.
    """
    folder = fetch_model(config.model).path
    decoder = fetch_model(config.decoder or _decoder_of(folder, config.model))
    tokenizer = graft.load_tokenizer(decoder.path)
    processor = AutoProcessor.from_pretrained(folder)
    asked = [_ids(tokenizer, prompt) for prompt in prompts]
    for prompt, expected in zip(prompts, asked):
        compare_ids(tokenizer, f"{prompt.name}: the prompt", expected, _ids(processor, prompt))

    say(f"{decoder.origin}: {len(prompts)} answers")
    alone = AutoModelForCausalLM.from_pretrained(decoder.path, dtype=torch.float32, device_map=config.device).eval()
    answers = [_answer(alone, ids, config) for ids in asked]
    del alone
    gc.collect()
    say(f"{config.model}: {len(prompts)} answers")
    model = load_a3(folder, torch.float32, config.device)
    furthest, tokens = 0.0, 0
    for prompt, ids, (expected, logits) in zip(prompts, asked, answers):
        found, ours = _answer(model, ids, config)
        compare_ids(tokenizer, f"{prompt.name}: the answer", expected, found)
        furthest, tokens = max(furthest, float((logits - ours).abs().max())), tokens + len(found)
    if not furthest <= LOGIT_TOLERANCE:  # also not a number
        raise RunError(
            f"{config.model} answers as {decoder.origin} does alone, but its logits differ by up to {furthest:g}: some "
            "weight is not the decoder's; `jobs/graft.py verify` names it"
        )
    return (
        f"{config.model} answers {len(prompts)} prompts without images as {decoder.origin} does alone: {tokens} tokens are "
        f"equal, greedy, float32 on {config.device}; logits differ by at most {furthest:g}"
    )


def _decoder_of(folder: Path, uri: str) -> str:
    try:
        return str(json.loads((folder / graft.MANIFEST_FILE).read_text())["sources"]["decoder"])
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{uri} has no {graft.MANIFEST_FILE} that names its decoder; give --decoder (a folder, an s3:// URI or a hub id)"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{uri}/{graft.MANIFEST_FILE} is damaged: {error!r}; give --decoder") from error


def _ids(speaker: Any, prompt: Prompt) -> list[int]:
    """Token ids of a conversation by a tokenizer's or a processor's own template."""
    try:
        batch = speaker.apply_chat_template(
            [dict(message) for message in prompt.messages],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            **prompt.options,
        )
    except TemplateError as error:
        raise RunError(f"{prompt.name}: the chat template refuses the conversation: {error}") from error
    ids = batch["input_ids"]
    return list(ids[0] if isinstance(ids[0], list) else ids)  # a processor gives a batch of one


@torch.no_grad()
def _answer(model: PreTrainedModel, ids: Sequence[int], config: TextConfig) -> tuple[list[int], torch.Tensor]:
    """Greedy token ids and their logits, float32 (tokens, vocabulary)."""
    prompt = torch.tensor([ids], device=config.device)
    out = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=config.max_new_tokens,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return out.sequences[0, len(ids) :].tolist(), torch.cat(out.logits).float().cpu()


def compare_ids(tokenizer: Any, what: str, expected: Sequence[int], found: Sequence[int]) -> None:
    """Raises RunError where two sequences part, with the token of each."""
    if list(expected) == list(found):
        return
    place = next((i for i, (a, b) in enumerate(zip(expected, found)) if a != b), min(len(expected), len(found)))
    theirs, ours = (
        repr(tokenizer.decode([ids[place]])) if place < len(ids) else "nothing more" for ids in (expected, found)
    )
    raise RunError(f"{what} differs at token {place}: the decoder alone has {theirs}, the A3 {ours}")
