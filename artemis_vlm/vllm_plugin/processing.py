"""What vLLM asks before the model runs: pixels, the number of image tokens, the chat template.

Pixels are those of `ArtemisVLMProcessor`, so of the checkpoint's own `preprocessor_config.json`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from vllm.model_executor.models.qwen2_vl import Qwen2VLProcessingInfo, _create_qwen2vl_field_factory
from vllm.multimodal.processing import BaseDummyInputsBuilder, BaseMultiModalProcessor, PromptReplacement

from artemis_vlm import chat, processing
from artemis_vlm.configuration import ArtemisVLMConfig


class ArtemisVLMProcessor(processing.ArtemisVLMProcessor):
    """The processor, with a template that knows the checkpoint's habits by itself.

    vLLM renders templates without our `apply_chat_template`; it takes the processor's template (with `tools` in a
    request the tokenizer's, which knows no habits). Registered in place of the other, so it has the same name, which is
    in `processor_config.json`.
    """

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> ArtemisVLMProcessor:
        found: ArtemisVLMProcessor = super().from_pretrained(*args, **kwargs)
        if isinstance(found.chat_template, str):
            found.chat_template = chat.with_habits(found.chat_template, found.image_turn_thinking, found.max_images_per_turn)
        return found

    def _check_counts(self, texts: list[str], images: Any) -> None:
        # Of images that it has processed before, vLLM up to 0.24 asks for the text's ids alone. It counts by itself.
        if images is not None:
            super()._check_counts(texts, images)


@lru_cache(maxsize=8)
def _processor(folder: str, revision: str | None) -> ArtemisVLMProcessor:
    return ArtemisVLMProcessor.from_pretrained(folder, revision=revision)


class ProcessingInfo(Qwen2VLProcessingInfo):  # type: ignore[misc]
    """Qwen2-VL's, whose resizing and counting are ours, for images alone."""

    def get_hf_config(self) -> ArtemisVLMConfig:
        config: ArtemisVLMConfig = self.ctx.get_hf_config(ArtemisVLMConfig)
        return config

    def get_hf_processor(self, **_: object) -> ArtemisVLMProcessor:
        """One for all requests: `mm_processor_kwargs` such as max_pixels go into its calls, not into its making."""
        return _processor(self.ctx.model_config.model, self.ctx.model_config.revision)

    def get_image_processor(self, **kwargs: object) -> Any:
        return self.get_hf_processor(**kwargs).image_processor

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"image": None}

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        return {"image": self.get_max_image_tokens()}


class DummyInputs(BaseDummyInputsBuilder[ProcessingInfo]):  # type: ignore[misc]
    """The largest image, for vLLM's memory profile."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        return chat.IMAGE_TOKEN * mm_counts.get("image", 0)

    def get_dummy_mm_data(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Mapping[str, Any]) -> dict[str, Any]:
        size = self.info.get_image_size_with_most_features()
        images = self._get_dummy_images(
            width=size.width,
            height=size.height,
            num_images=mm_counts.get("image", 0),
            overrides=mm_options.get("image"),
        )
        return {"image": images}


class MultiModalProcessor(BaseMultiModalProcessor[ProcessingInfo]):  # type: ignore[misc]
    """Each placeholder of the prompt becomes as many as its image has tokens."""

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, object]) -> dict[str, Any]:
        fields = _create_qwen2vl_field_factory(self.info.get_hf_config().vision_config.spatial_merge_size)(hf_inputs)
        return {name: fields[name] for name in ("pixel_values", "image_embeds", "image_grid_thw")}

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any
    ) -> Sequence[PromptReplacement]:
        config = self.info.get_hf_config()
        placeholder, merged = config.image_token_id, config.vision_config.spatial_merge_size**2

        def expand(index: int) -> list[int]:
            grid = out_mm_kwargs["image"][index]["image_grid_thw"].data
            return [placeholder] * (int(grid.prod()) // merged)

        return [PromptReplacement(modality="image", target=[placeholder], replacement=expand)]
