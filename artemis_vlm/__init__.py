"""ArtemisVLM: a vision-language model by composition, as Transformers classes. Importing it registers them."""

from __future__ import annotations

from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSeq2SeqLM, AutoProcessor

from artemis_vlm.configuration import ArtemisVLMConfig
from artemis_vlm.errors import ArtemisError, CheckpointError, RunError, SampleError
from artemis_vlm.image import ImageSpec
from artemis_vlm.modeling import ArtemisVLMForConditionalGeneration, ArtemisVLMProjector
from artemis_vlm.processing import ArtemisDataCollator, ArtemisVLMProcessor
from artemis_vlm.version import __version__

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

AutoConfig.register("artemis_vlm", ArtemisVLMConfig, exist_ok=True)
AutoProcessor.register(ArtemisVLMConfig, ArtemisVLMProcessor, exist_ok=True)
for _auto in (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSeq2SeqLM):
    _auto.register(ArtemisVLMConfig, ArtemisVLMForConditionalGeneration, exist_ok=True)
