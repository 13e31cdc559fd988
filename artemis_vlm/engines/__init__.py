"""Engines: what turns images into embeddings, and prompts with embeddings into answers, for many requests at once."""

from __future__ import annotations

from artemis_vlm.engines.base import (
    Completion,
    DecoderEngine,
    Delta,
    EngineStats,
    FinishReason,
    ImageEmbedding,
    Request,
    SamplingParams,
    complete,
)
from artemis_vlm.engines.encoder import EmbeddingCache, ImageEncoder, image_key
from artemis_vlm.engines.transformers import EngineConfig, TransformersEngine

__all__ = [
    "Completion",
    "DecoderEngine",
    "Delta",
    "EmbeddingCache",
    "EngineConfig",
    "EngineStats",
    "FinishReason",
    "ImageEmbedding",
    "ImageEncoder",
    "Request",
    "SamplingParams",
    "TransformersEngine",
    "complete",
    "image_key",
]
