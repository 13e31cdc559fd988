"""What the benchmarks on a GPU share: the shapes of models whose weights are drawn, and the report."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from transformers import LlamaConfig, MistralConfig

from pipelines.machine import machine


@dataclass(frozen=True)
class Shapes:
    """Widths of a model; weights are drawn."""

    vision: dict[str, Any]
    text: MistralConfig | LlamaConfig


SHAPES: Final = {
    "a3": Shapes(
        {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16, "out_hidden_size": 2048}
        | {"num_position_embeddings": 2304, "deepstack_visual_indexes": [5, 11, 17]},
        MistralConfig(
            vocab_size=131072,
            hidden_size=5120,
            intermediate_size=14336,
            num_hidden_layers=40,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=128,
            max_position_embeddings=131072,
            rope_theta=1e6,
            sliding_window=None,
            tie_word_embeddings=False,
        ),
    ),
    "demo": Shapes(
        {"depth": 8, "hidden_size": 224, "intermediate_size": 896, "num_heads": 7, "out_hidden_size": 512}
        | {"num_position_embeddings": 1024, "deepstack_visual_indexes": []},
        LlamaConfig(
            vocab_size=131072,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            head_dim=64,
            max_position_embeddings=8192,
            tie_word_embeddings=True,
        ),
    ),
}


@dataclass
class Report:
    """What is printed, kept for the file; failures decide the exit code."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    @contextmanager
    def guarded(self, what: str) -> Iterator[None]:
        """Reports what goes wrong inside, so that what comes after can still be measured."""
        try:
            yield
        except Exception as error:
            traceback.print_exc(limit=-8)
            self.failures.append(f"{what}: {type(error).__name__}: {str(error)[:300]}")
            print(f"FAILED {self.failures[-1]}", flush=True)
        collect()


def hardware(device: torch.device) -> dict[str, Any]:
    found = machine(device)
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"capability": f"sm_{properties.major}{properties.minor}"}
        found |= {"memory_gib": round(properties.total_memory / 2**30, 1), "cuda": torch.version.cuda}
    else:
        found |= {"threads": torch.get_num_threads()}
    return found


def collect() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
