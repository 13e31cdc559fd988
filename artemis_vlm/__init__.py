"""ArtemisVLM: a vision-language model by composition, as Transformers classes. Importing it registers them.

A process that only prepares data can spare itself torch and the model's classes, which take seconds to import: with
ARTEMIS_VLM_LIGHT=1 in its environment nothing is registered and the names below are not here, but its modules
(`artemis_vlm.image`, `artemis_vlm.chat`, `artemis_vlm.examples`) are.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from artemis_vlm.version import __version__

LIGHT: Final = "ARTEMIS_VLM_LIGHT"

if TYPE_CHECKING or os.environ.get(LIGHT) != "1":
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoModelForSeq2SeqLM,
        AutoProcessor,
    )

    from artemis_vlm.configuration import ArtemisVLMConfig
    from artemis_vlm.errors import ArtemisError, CheckpointError, RunError, SampleError
    from artemis_vlm.image import ImageSpec
    from artemis_vlm.modeling import ArtemisVLMForConditionalGeneration, ArtemisVLMProjector
    from artemis_vlm.processing import ArtemisDataCollator, ArtemisVLMProcessor

    AutoConfig.register("artemis_vlm", ArtemisVLMConfig, exist_ok=True)
    AutoProcessor.register(ArtemisVLMConfig, ArtemisVLMProcessor, exist_ok=True)
    for _auto in (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSeq2SeqLM):
        _auto.register(ArtemisVLMConfig, ArtemisVLMForConditionalGeneration, exist_ok=True)

__all__ = [
    "ArtemisDataCollator",
    "ArtemisError",
    "ArtemisVLMConfig",
    "ArtemisVLMForConditionalGeneration",
    "ArtemisVLMProcessor",
    "ArtemisVLMProjector",
    "CheckpointError",
    "ImageSpec",
    "RunError",
    "SampleError",
    "__version__",
]
