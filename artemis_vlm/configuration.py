"""The composite configuration: a Qwen3-VL vision tower, a projector, any causal decoder."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig


class ArtemisVLMConfig(PreTrainedConfig):  # type: ignore[misc]
    """Written as `config.json`; readable by the published `artemis-vlm` package and the other way round.

    Args:
        vision_config: a `Qwen3VLVisionConfig` or its fields.
        text_config: any causal decoder's configuration or its fields; never altered.
        image_token_id, video_token_id: slots 22 and 23 of the A-series tokenizer.
        projector_hidden_act: activation between the projector's two layers.
        image_turn_thinking: whether a turn with an image opens a think block unless the caller says otherwise. The
            published A3 was trained so, hence the default for folders that do not say; `graft` writes False.
        max_images_per_turn: more images in one turn are refused.
    """

    model_type = "artemis_vlm"
    sub_configs = {"vision_config": Qwen3VLVisionConfig, "text_config": AutoConfig}  # noqa: RUF012 - Transformers' protocol

    def __init__(
        self,
        vision_config: Qwen3VLVisionConfig | dict[str, Any] | None = None,
        text_config: PreTrainedConfig | dict[str, Any] | None = None,
        image_token_id: int = 22,
        video_token_id: int = 23,
        projector_hidden_act: str = "gelu",
        image_turn_thinking: bool = True,
        max_images_per_turn: int = 1,
        **kwargs: Any,
    ) -> None:
        # Any: the two are configurations of other classes, whose fields mypy cannot know.
        self.vision_config: Any = vision_config
        if not isinstance(vision_config, PreTrainedConfig):
            self.vision_config = Qwen3VLVisionConfig(**(vision_config or {}))
        self.text_config: Any = text_config
        if not isinstance(text_config, PreTrainedConfig):
            self.text_config = AutoConfig.for_model(**{"model_type": "mistral", **(text_config or {})})
        self.image_token_id = image_token_id
        self.video_token_id = video_token_id
        self.projector_hidden_act = projector_hidden_act
        self.image_turn_thinking = image_turn_thinking
        self.max_images_per_turn = max_images_per_turn
        kwargs.setdefault("tie_word_embeddings", bool(self.text_config.tie_word_embeddings))
        super().__init__(**kwargs)
