"""An A3 as vLLM computes it: vLLM's Qwen3-VL tower, the projector, vLLM's own class of the decoder.

Shape suffixes: P patches, I images, V image tokens, H decoder hidden size.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, Final

import torch
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from vllm.config import VllmConfig
from vllm.model_executor.layers.activation import get_act_fn
from vllm.model_executor.layers.linear import ColumnParallelLinear, RowParallelLinear
from vllm.model_executor.models.interfaces import SupportsMultiModal, SupportsPP
from vllm.model_executor.models.module_mapping import MultiModelKeys
from vllm.model_executor.models.qwen3_vl import Qwen3_VisionTransformer
from vllm.model_executor.models.utils import AutoWeightsLoader, init_vllm_registered_model, maybe_prefix
from vllm.model_executor.models.vision import run_dp_sharded_mrope_vision_model
from vllm.multimodal import MULTIMODAL_REGISTRY

from artemis_vlm.configuration import ArtemisVLMConfig
from artemis_vlm.vllm_plugin.processing import DummyInputs, MultiModalProcessor, ProcessingInfo

#: Kept in checkpoints, byte for byte; nothing reads what they would compute.
UNUSED_WEIGHTS: Final = "visual.deepstack_merger_list."


class Projector(nn.Module):
    """Column- then row-parallel, as a decoder's own MLP is: each card holds a share of both matrices (73 MB in all).

    Both layouts of the tower, sharded weights or sharded images, hand every card all features, which this takes. Never
    quantized: it is 0.3 % of the model, and its accuracy is every image token's.
    """

    def __init__(self, config: ArtemisVLMConfig, prefix: str) -> None:
        super().__init__()
        inside, outside = config.vision_config.out_hidden_size, config.text_config.hidden_size
        self.fc1: Any = ColumnParallelLinear(inside, outside, prefix=f"{prefix}.fc1")
        self.act: Any = get_act_fn(config.projector_hidden_act)
        self.fc2: Any = RowParallelLinear(outside, outside, prefix=f"{prefix}.fc2")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(V, out_hidden) to (V, H)."""
        projected: torch.Tensor = self.fc2(self.act(self.fc1(x)[0]))[0]
        return projected


@MULTIMODAL_REGISTRY.register_processor(MultiModalProcessor, info=ProcessingInfo, dummy_inputs=DummyInputs)
class ArtemisVLMForConditionalGeneration(nn.Module, SupportsMultiModal, SupportsPP):  # type: ignore[misc]
    """Keys as in the folder: `visual.*`, `multi_modal_projector.fc1/fc2.*`, `language_model.*`.

    `--tensor-parallel-size` splits the decoder, the projector and the tower; with `--mm-encoder-tp-mode data` each card
    has the whole tower and a share of the images. `--quantization fp8` is for the decoder alone.
    """

    supports_encoder_tp_data = True
    # vLLM's names for what it fuses, by which quantization finds the parts
    packed_modules_mapping = {  # noqa: RUF012 - vLLM's protocol
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
        "qkv": ["qkv"],
    }

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str:
        if modality != "image":
            raise ValueError(f"a part of the kind {modality}; this model takes text and images")
        return "<|vision_start|><|image_pad|><|vision_end|>"

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.config: ArtemisVLMConfig = vllm_config.model_config.hf_config
        self.dtype = vllm_config.model_config.dtype
        self.shards_images = vllm_config.model_config.multimodal_config.mm_encoder_tp_mode == "data"
        vision = copy.deepcopy(self.config.vision_config)
        vision.deepstack_visual_indexes = []
        with self._mark_tower_model(vllm_config, "image"):  # type: ignore[operator]
            self.visual: Any = Qwen3_VisionTransformer(vision, prefix=maybe_prefix(prefix, "visual"))
            self.multi_modal_projector: Any = Projector(self.config, maybe_prefix(prefix, "multi_modal_projector"))
        with self._mark_language_model(vllm_config):  # type: ignore[operator]
            self.language_model = init_vllm_registered_model(
                vllm_config=vllm_config,
                hf_config=self.config.text_config,
                prefix=maybe_prefix(prefix, "language_model"),
                architectures=decoder_architectures(self.config),
            )
        self.make_empty_intermediate_tensors = self.language_model.make_empty_intermediate_tensors

    def embed_multimodal(
        self,
        pixel_values: torch.Tensor | None = None,
        image_embeds: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        **_: object,
    ) -> tuple[torch.Tensor, ...]:
        """Embeddings (V_i, H) of each image, from its pixels or, computed elsewhere, as they are.

        Args:
            pixel_values: (P, 1536); image_embeds: (V, H); image_grid_thw: int64 (I, 3), on the CPU.
        """
        if image_grid_thw is None:
            return ()
        if image_embeds is not None:
            features = image_embeds.to(self.dtype)
        elif pixel_values is None:
            return ()
        elif self.shards_images:
            parts = run_dp_sharded_mrope_vision_model(
                self.visual, pixel_values, image_grid_thw.tolist(), rope_type="rope_3d"
            )
            features = self.multi_modal_projector(torch.cat(parts))
        else:
            features = self.multi_modal_projector(self.visual(pixel_values, grid_thw=image_grid_thw))
        counts = image_grid_thw.prod(-1) // self.config.vision_config.spatial_merge_size**2
        return torch.split(features, counts.tolist())

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        **_: object,
    ) -> Any:
        if intermediate_tensors is not None:
            inputs_embeds = None  # a later pipeline stage has hidden states instead
        return self.language_model.model(input_ids, positions, intermediate_tensors, inputs_embeds=inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> Any:
        return self.language_model.compute_logits(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        used = ((name, weight) for name, weight in weights if not name.startswith(UNUSED_WEIGHTS))
        loaded: set[str] = AutoWeightsLoader(self).load_weights(used)
        return loaded

    def get_mm_mapping(self) -> MultiModelKeys:
        return MultiModelKeys.from_string_field(
            language_model="language_model", connector="multi_modal_projector", tower_model="visual"
        )


def decoder_architectures(config: ArtemisVLMConfig) -> list[str]:
    """The decoder's own class: what its configuration says, else what Transformers builds of its type."""
    named: list[str] | None = getattr(config.text_config, "architectures", None)
    return named or [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.text_config.model_type]]
