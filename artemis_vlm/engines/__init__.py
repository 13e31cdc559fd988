"""Engines: what turns images into embeddings, and prompts with embeddings into answers, for many requests at once."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from pathlib import Path

import torch

from artemis_vlm.engines.base import (
    Completion,
    DecoderEngine,
    Delta,
    EngineConfig,
    EngineKind,
    EngineStats,
    FinishReason,
    ImageEmbedding,
    Request,
    SamplingParams,
    broken_off,
    complete,
)
from artemis_vlm.engines.encoder import EmbeddingCache, ImageEncoder, image_key
from artemis_vlm.engines.transformers import TransformersEngine
from artemis_vlm.errors import RunError

logger = logging.getLogger(__name__)

__all__ = [
    "Completion",
    "DecoderEngine",
    "Delta",
    "EmbeddingCache",
    "EngineConfig",
    "EngineKind",
    "EngineStats",
    "FinishReason",
    "ImageEmbedding",
    "ImageEncoder",
    "Request",
    "SamplingParams",
    "TransformersEngine",
    "broken_off",
    "complete",
    "engine_kind",
    "image_key",
    "load_engine",
]


def load_engine(
    folder: Path, config: EngineConfig | None = None, dtype: torch.dtype | None = None, device: str = "cpu"
) -> DecoderEngine:
    """The engine that a configuration asks for, on the decoder of an A3 folder.

    Args:
        dtype: None takes that in which the decoder is stored.

    Raises:
        RunError: the engine cannot do what is asked, or is not there.
    """
    config = config or EngineConfig()
    kind = engine_kind(config.kind, device)
    logger.info("the decoder runs on the %s engine (asked for: %s, device %s)", kind, config.kind, device)
    if kind == "transformers":
        return TransformersEngine.load(folder, config, dtype, device)
    if not _has_vllm():
        raise RunError("the engine is vllm, which is not installed here; pip install 'artemis-vlm[vllm]'")
    from artemis_vlm.engines.vllm import VllmEngine

    return VllmEngine.load(folder, config, dtype, device)


def engine_kind(kind: EngineKind, device: str) -> EngineKind:
    """What auto means here; anything else is what it is."""
    if kind != "auto":
        return kind
    return "vllm" if torch.device(device).type == "cuda" and _has_vllm() else "transformers"


def _has_vllm() -> bool:
    spec = find_spec("vllm")
    return spec is not None and spec.origin is not None  # without: some folder of that name
