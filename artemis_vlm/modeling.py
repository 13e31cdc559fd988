"""The model: vision tower -> projector -> the decoder's own embeddings at the image placeholders -> decoder.

The decoder is not modified and never looked into: it is whatever `AutoModelForCausalLM` builds, with its 1-D
positions. DeepStack and interleaved M-RoPE, Qwen3-VL's changes to a decoder, are not used.

Shape suffixes: B batch, T tokens, P patches, I images, V image tokens (V = P / merge_size**2), H decoder hidden size.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel
from transformers.utils.generic import can_return_tuple

from artemis_vlm.configuration import ArtemisVLMConfig
from artemis_vlm.errors import SampleError
from artemis_vlm.frozen import frozen_head_cross_entropy
from artemis_vlm.image import ImageSpec
from artemis_vlm.packing import PackedBatch


class ArtemisVLMProjector(nn.Module):
    """Two linear layers from the tower's merged features to the decoder's embedding space: the only trained part."""

    def __init__(self, in_dim: int, out_dim: int, act: str = "gelu") -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_dim, out_dim)
        self.act = ACT2FN[act]
        self.fc2 = nn.Linear(out_dim, out_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(V, in_dim) to (V, out_dim)."""
        return self.fc2(self.act(self.fc1(x)))  # type: ignore[no-any-return]


class ArtemisVLMForConditionalGeneration(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """A vision-language model by composition. Keys: `visual.*`, `language_model.*`, `multi_modal_projector.fc1/fc2.*`."""

    config_class = ArtemisVLMConfig
    base_model_prefix = "language_model"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_attention_backend = True
    supports_gradient_checkpointing = True

    def __init__(
        self,
        config: ArtemisVLMConfig,
        vision_model: Qwen3VLVisionModel | None = None,
        language_model: PreTrainedModel | None = None,
    ) -> None:
        super().__init__(config)
        for part in (vision_model, language_model):
            # post_init would draw new weights for every module that Transformers has not loaded itself.
            for module in part.modules() if part is not None else ():
                module._is_hf_initialized = True
        self.visual = Qwen3VLVisionModel._from_config(config.vision_config) if vision_model is None else vision_model
        # Their mergers are kept in the checkpoint, but nothing reads what they would compute.
        self.visual.deepstack_visual_indexes = []
        decoder = AutoModelForCausalLM.from_config(config.text_config) if language_model is None else language_model
        self.language_model = decoder
        self.multi_modal_projector = ArtemisVLMProjector(
            config.vision_config.out_hidden_size, config.text_config.hidden_size, config.projector_hidden_act
        )
        self.vocab_size = config.text_config.vocab_size
        self._can_compile_fullgraph = decoder._can_compile_fullgraph  # decoding steps run the decoder alone
        self.post_init()
        if language_model is not None:  # what ends an answer may stand there alone
            self.generation_config = copy.deepcopy(language_model.generation_config)

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()  # type: ignore[no-any-return]

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()  # type: ignore[no-any-return]

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.language_model.set_output_embeddings(new_embeddings)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Module:
        """The decoder's own, which keeps its loss, its head and its configuration in step."""
        embeddings: nn.Module = self.language_model.resize_token_embeddings(*args, **kwargs)
        self.vocab_size = self.config.text_config.vocab_size = self.language_model.config.vocab_size
        return embeddings

    def get_image_features(
        self, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor, return_dict: bool | None = None, **kwargs: Any
    ) -> torch.Tensor | BaseModelOutputWithPooling:
        """Image embeddings in the decoder's space.

        Args:
            pixel_values: float (P, 1536), as Qwen2-VL's image processors give, or one frame of it (P, 768).
            image_grid_thw: int64 (I, 3), frames (1), height and width in patches.
            return_dict: whether to answer as Transformers' own models do. Unlike there it is off unless asked for: the
                published package gives a tensor.
            kwargs: for the tower, such as `output_hidden_states`.

        Returns:
            (V, H), the images one after the other; with `return_dict` an output whose `pooler_output` holds one
            (tokens, H) for each image and whose `last_hidden_state` is the tower's (P, hidden), before it merges.
        """
        pixel_values = repeat_frame(pixel_values, self.config.vision_config.temporal_patch_size, self.visual)
        seen = self.visual(pixel_values.to(self.visual.dtype), grid_thw=image_grid_thw, return_dict=True, **kwargs)
        features = self.project(seen.pooler_output)
        if not return_dict:
            return features
        counts = image_grid_thw.prod(-1) // self.config.vision_config.spatial_merge_size**2
        return BaseModelOutputWithPooling(
            last_hidden_state=seen.last_hidden_state,
            pooler_output=torch.split(features, counts.tolist()),
            hidden_states=seen.hidden_states,
            attentions=seen.attentions,
        )

    def project(self, merged: torch.Tensor) -> torch.Tensor:
        """(V, out_hidden) to (V, H), computed in the tower's dtype even while training keeps float32 weights."""
        weights = self.multi_modal_projector.fc1.weight.dtype
        with torch.autocast(merged.device.type, merged.dtype, enabled=merged.dtype != weights):
            return self.multi_modal_projector(merged)  # type: ignore[no-any-return]

    def placeholders(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
        """bool (B, T): where an image token is; without ids, where the embedding is that of the placeholder."""
        if input_ids is not None and input_ids.shape[-1]:
            return input_ids.eq(self.config.image_token_id)
        if inputs_embeds is None:
            raise ValueError("neither input_ids nor inputs_embeds; one of them is needed")
        placeholder = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
        return inputs_embeds.eq(self.get_input_embeddings()(placeholder)).all(-1)

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,  # by name, as all of these: `generate` takes what the signature has
        **kwargs: Any,
    ) -> Any:
        """The decoder's own output; `labels` are token ids with -100 where there is nothing to learn.

        Args:
            input_ids: int64 (B, T); rows may or may not hold images. Or `inputs_embeds`, (B, T, H).
            pixel_values, image_grid_thw: as in `get_image_features`, all rows' images in order.
            image_features: (V, H), what `get_image_features` gave before, in place of pixels.
            logits_to_keep, position_ids, past_key_values, kwargs: the decoder's.

        Raises:
            SampleError: placeholders and image features differ in number; the text has both numbers.
        """
        if inputs_embeds is None:
            if input_ids is None:
                raise ValueError("neither input_ids nor inputs_embeds; one of them is needed")
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if pixel_values is not None:
            if image_grid_thw is None:
                raise ValueError("pixel_values need image_grid_thw, the height and width of each image in patches")
            image_features = self.get_image_features(pixel_values, image_grid_thw)
        if image_features is not None:
            inputs_embeds = splice(inputs_embeds, self.placeholders(input_ids, inputs_embeds), image_features)
        if not isinstance(logits_to_keep, int) or logits_to_keep:
            kwargs["logits_to_keep"] = logits_to_keep
        given = {"position_ids": position_ids, "past_key_values": past_key_values}
        kwargs |= {name: value for name, value in given.items() if value is not None}
        return self.language_model(inputs_embeds=inputs_embeds, attention_mask=attention_mask, labels=labels, **kwargs)

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        *args: Any,
        inputs_embeds: torch.Tensor | None = None,  # by name: `generate` reads the signature
        pixel_values: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Hands the images on with the prompt and, while there is a cache, never again; those it holds already, not at all.

        transformers 5 makes the cache before the first step, so an empty cache is no sign of it; the flag is.
        """
        inputs: dict[str, Any] = self.language_model.prepare_inputs_for_generation(
            input_ids, *args, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs
        )
        if is_first_iteration or not kwargs.get("use_cache", True):
            images = {"pixel_values": pixel_values, "image_grid_thw": image_grid_thw, "image_features": image_features}
            given = {name: value for name, value in images.items() if value is not None}
            left = inputs.get("input_ids")
            if given and left is not None and left.shape[1] < input_ids.shape[1]:
                given = {"image_features": self._later_features(input_ids, input_ids.shape[1] - left.shape[1], **given)}
            inputs |= given
        return inputs

    def _later_features(self, input_ids: torch.Tensor, cached: int, **images: torch.Tensor) -> torch.Tensor:
        """Of the images of input_ids (B, T) the features (V, H) at placeholders after the first `cached` tokens."""
        is_image = self.placeholders(input_ids, None)
        features = images.get("image_features")
        if features is None:
            features = self.get_image_features(images["pixel_values"], images["image_grid_thw"])
        check_counts(int(is_image.sum()), len(features))
        later = torch.arange(input_ids.shape[1], device=input_ids.device) >= cached
        return features[later.expand_as(is_image)[is_image].to(features.device)]

    def _prefill(self, input_ids: torch.Tensor, generation_config: Any, model_kwargs: dict[str, Any], **kwargs: Any) -> Any:
        """Transformers' own, which would cut a prompt into chunks and leave its images out.

        Raises:
            SampleError: a prompt with images is to be cut.
        """
        size = generation_config.prefill_chunk_size
        if size is not None and any(model_kwargs.get(name) is not None for name in ("pixel_values", "image_features")):
            raise SampleError(f"prefill_chunk_size is {size}; a prompt with images cannot be cut into chunks: leave it out")
        return super()._prefill(input_ids, generation_config, model_kwargs, **kwargs)

    def _supports_logits_to_keep(self) -> bool:
        return self.language_model._supports_logits_to_keep()  # type: ignore[no-any-return]

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """For beams and several answers: every copy of a row gets that row's image features, computed once.

        Transformers would repeat patches, grids and features as if each belonged to one row.
        """
        images = {k: kwargs.pop(k, None) for k in ("pixel_values", "image_grid_thw", "image_features")}
        if expand_size > 1:
            pixel_values, grid, features = images.values()
            if pixel_values is not None:
                features = self.get_image_features(pixel_values, grid)
            if features is not None:
                counts = self.placeholders(input_ids, kwargs.get("inputs_embeds")).sum(1).tolist()
                check_counts(sum(counts), len(features))
                features = torch.cat([part.repeat(expand_size, 1) for part in torch.split(features, counts)])
            images = {"image_features": features}
        input_ids, kwargs = super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **kwargs)
        return input_ids, kwargs | {name: value for name, value in images.items() if value is not None}

    def set_training_stage(self, stage: str, unfreeze_vision_top_n: int = 0) -> tuple[int, int]:
        """Stage 1 trains the projector alone; stage 2 the decoder too. The tower's top blocks can be opened.

        Returns:
            Trainable and total number of parameters.
        """
        if stage not in ("stage1", "stage2"):
            raise ValueError(f"stage is {stage!r}; expected 'stage1' or 'stage2'")
        self.visual.requires_grad_(False)
        self.language_model.requires_grad_(stage == "stage2")
        self.multi_modal_projector.requires_grad_(True)
        if unfreeze_vision_top_n:
            for block in list(self.visual.blocks)[-unfreeze_vision_top_n:]:
                block.requires_grad_(True)
        sizes = [(p.numel(), p.requires_grad) for p in self.parameters()]
        return sum(n for n, trains in sizes if trains), sum(n for n, _ in sizes)

    @classmethod
    def from_a2_and_vision(
        cls,
        text_model_path: str,
        vision_model: Qwen3VLVisionModel | None = None,
        vision_config: Qwen3VLVisionConfig | None = None,
        image_token_id: int = 22,
        video_token_id: int = 23,
        torch_dtype: torch.dtype = torch.bfloat16,
    ) -> ArtemisVLMForConditionalGeneration:
        """A fresh graft in memory: a decoder from a folder or the hub, a tower as it is, a new projector.

        The published package's entry point; `artemis_vlm.graft` does it file to file, with a manifest.
        """
        decoder = AutoModelForCausalLM.from_pretrained(text_model_path, dtype=torch_dtype)
        if vision_model is None:
            vision_model = Qwen3VLVisionModel._from_config(vision_config or Qwen3VLVisionConfig())
        config = ArtemisVLMConfig(
            vision_config=vision_model.config.to_dict(),
            text_config=decoder.config.to_dict(),
            image_token_id=image_token_id,
            video_token_id=video_token_id,
            image_turn_thinking=False,
        )
        model = cls(config, vision_model=vision_model, language_model=decoder)
        model.multi_modal_projector.to(decoder.device, torch_dtype)
        model.visual.to(decoder.device, torch_dtype)
        return model


def splice(embeds: torch.Tensor, is_image: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Embeddings with image features written over the placeholders.

    Args:
        embeds: (B, T, H); is_image: bool (B, T); features: (V, H)

    Raises:
        SampleError: the number of placeholders is not V.
    """
    check_counts(int(is_image.sum()), features.shape[0])
    is_image = is_image.to(embeds.device)
    return embeds.masked_scatter(is_image.unsqueeze(-1), features.to(embeds.device, embeds.dtype))


def check_counts(placeholders: int, features: int) -> None:
    if placeholders != features:
        raise SampleError(
            f"{placeholders} image placeholder tokens for {features} image features; each image needs exactly "
            "height * width / merge_size**2 of them, which ArtemisVLMProcessor writes"
        )


def normalize(patches: torch.Tensor, spec: ImageSpec) -> torch.Tensor:
    """uint8 patches (P, 768) to the float32 values of one frame, as Qwen2-VL's PIL image processor computes them.

    (x / 255 - mean) / std, each step rounded to float32 as there, so the result is equal bit for bit.
    """
    mean, std = _mean_and_std(spec, patches.device)
    return (patches.to(torch.float32) / 255 - mean) / std


@functools.cache
def _mean_and_std(spec: ImageSpec, device: torch.device) -> tuple[torch.Tensor, ...]:
    """float32 (768,) each; kept, because the host waits for the device to bring them there."""
    return tuple(
        torch.tensor(values, dtype=torch.float32, device=device).repeat_interleave(spec.patch_size**2)
        for values in (spec.image_mean, spec.image_std)
    )


def repeat_frame(pixels: torch.Tensor, frames: int, visual: Qwen3VLVisionModel) -> torch.Tensor:
    """One frame (P, C * p * p) to the (P, C * frames * p * p) that the tower's patch embedding takes."""
    full = visual.patch_embed.proj.weight[0].numel()
    if pixels.shape[-1] == full:
        return pixels
    if pixels.shape[-1] * frames != full:
        raise ValueError(
            f"a patch has {pixels.shape[-1]} values; this tower takes {full}, or {full // frames} for one frame"
        )
    channels = visual.patch_embed.in_channels
    return pixels.view(len(pixels), channels, 1, -1).expand(-1, -1, frames, -1).reshape(len(pixels), full)


def packed_features(
    model: ArtemisVLMForConditionalGeneration, patches: torch.Tensor, grid_thw: torch.Tensor, spec: ImageSpec
) -> torch.Tensor:
    """The frozen tower's merged features (V, out_hidden) of uint8 patches (P, 768); no gradient."""
    with torch.no_grad():
        return tower_features(model.visual, patches, grid_thw, spec)


def tower_features(
    visual: Qwen3VLVisionModel, patches: torch.Tensor, grid_thw: torch.Tensor, spec: ImageSpec
) -> torch.Tensor:
    """Merged features (V, out_hidden) of uint8 patches (P, 768), of a tower by itself."""
    pixels = repeat_frame(normalize(patches, spec).to(visual.dtype), spec.temporal_patch_size, visual)
    merged: torch.Tensor = visual(pixels, grid_thw=grid_thw.to(pixels.device), return_dict=True).pooler_output
    return merged


def packed_loss(model: ArtemisVLMForConditionalGeneration, batch: PackedBatch, spec: ImageSpec) -> torch.Tensor:
    """Summed cross entropy of a packed batch's supervised tokens; the gradient reaches the projector only.

    Equals the sum over samples of `model(input_ids, pixel_values, labels).loss * supervised tokens`. The model's parts
    must use packed attention (`frozen.use_packed_attention`). The projector may be float32 over bfloat16 parts: it
    then computes in bfloat16.

    Returns:
        float32 scalar.
    """
    decoder = model.language_model
    with torch.no_grad():
        embeds = decoder.get_input_embeddings()(batch.input_ids)
    if len(batch.image_index):
        merged = packed_features(model, batch.patches, batch.grid_thw, spec)
        embeds = embeds.index_copy(0, batch.image_index, model.project(merged).to(embeds.dtype))
    hidden = decoder_states(decoder, embeds, batch, batch.max_length)
    head = decoder.get_output_embeddings().weight
    return frozen_head_cross_entropy(hidden.index_select(0, batch.loss_index), head, batch.targets)


def decoder_states(decoder: PreTrainedModel, embeds: torch.Tensor, batch: PackedBatch, max_length: int) -> torch.Tensor:
    """Embeddings (T, H) to the decoder's last hidden states (T, H), by its own layers with packed attention."""
    states: torch.Tensor = decoder.get_decoder()(
        inputs_embeds=embeds[None],
        position_ids=batch.position_ids[None],
        use_cache=False,
        cu_seq_lens_q=batch.cu_seqlens,
        cu_seq_lens_k=batch.cu_seqlens,
        max_length_q=max_length,
        max_length_k=max_length,
    ).last_hidden_state[0]
    return states
