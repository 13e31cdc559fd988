"""The frozen tower and decoder on packed rows, written out for training.

`PackedModel.loss` equals `modeling.packed_loss`, which runs Transformers' own layers and with which the tests compare.
Weights that share an input lie in one tensor and are multiplied at once; each kind of layer is one function, compiled
once for all layers and lengths. Nothing is computed that cannot matter: in the last decoder layer only keys and values
before a sample's first supervised state, in the tower not the second copy of the frame.

Shape suffixes: T tokens, R tail tokens, P patches, I images, H hidden size, N heads, D head size, F inner size.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

from artemis_vlm import frozen
from artemis_vlm.errors import RunError
from artemis_vlm.examples import Example
from artemis_vlm.frozen import attend, frozen_head_cross_entropy, mark_rows
from artemis_vlm.image import ImageSpec
from artemis_vlm.linear import (
    PRECISIONS,
    Fp8Weight,
    ProbedWeight,
    Weight,
    check_fp8,
    frozen_linear,
    gated_mlp,
    rotate,
    rotated_heads,
)
from artemis_vlm.modeling import ArtemisVLMForConditionalGeneration, decoder_states, normalize
from artemis_vlm.packing import PackedBatch, pack

logger = logging.getLogger(__name__)

#: Rows are padded to a multiple of this on a GPU, whose kernels like round lengths.
PAD_TO: Final = 128
#: Decoder layers that are RMSNorm, rotary grouped attention and a gated SiLU MLP, without biases.
KNOWN_LAYERS: Final = ("MistralDecoderLayer", "LlamaDecoderLayer")
#: Of a made-up sample that shows whether other layers do in a packed row what they do alone, and how far off, as a share,
#: rounding may make the logits.
CHECKED_TOKENS: Final = 17
MOST_OFF: Final = {torch.float64: 1e-5, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Heads:
    """Of a decoder's attention, and the epsilon of its norms."""

    query: int
    key: int
    size: int
    epsilon: float


class LayerWeights(NamedTuple):
    """A decoder layer's. `attention` is query, key and value in one, or in the last layer query, and key and value."""

    input_norm: torch.Tensor
    attention: tuple[Weight, ...]
    out: Weight
    mlp_norm: torch.Tensor
    gate_up: Weight
    down: Weight

    @property
    def linears(self) -> dict[str, Weight]:
        attention = {f"attention.{i}": weight for i, weight in enumerate(self.attention)}
        return {**attention, "out": self.out, "gate_up": self.gate_up, "down": self.down}

    def with_linears(self, linears: Mapping[str, Weight]) -> LayerWeights:
        attention = tuple(linears[f"attention.{i}"] for i in range(len(self.attention)))
        return self._replace(attention=attention, out=linears["out"], gate_up=linears["gate_up"], down=linears["down"])


class BlockWeights(NamedTuple):
    """A tower block's: a weight and a bias each."""

    norm1: tuple[torch.Tensor, torch.Tensor]
    qkv: tuple[torch.Tensor, torch.Tensor]
    out: tuple[torch.Tensor, torch.Tensor]
    norm2: tuple[torch.Tensor, torch.Tensor]
    fc1: tuple[torch.Tensor, torch.Tensor]
    fc2: tuple[torch.Tensor, torch.Tensor]


def on_rows(
    function: Callable[..., torch.Tensor], compile_it: bool, varying: tuple[torch.Tensor, ...], *fixed: Any
) -> torch.Tensor:
    """A layer on tensors whose first dimension varies, and on what is the same in every batch."""
    if compile_it:
        mark_rows(*varying)
        function = frozen.compiled(function)
    return function(*varying, *fixed)


# --- the decoder -----------------------------------------------------------------------------------------------------


def _mlp(x: torch.Tensor, w: LayerWeights, heads: Heads) -> torch.Tensor:
    return x + gated_mlp(x, w.mlp_norm, heads.epsilon, w.gate_up, w.down)


def decoder_layer(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    samples: torch.Tensor,
    w: LayerWeights,
    heads: Heads,
    max_length: int,
) -> torch.Tensor:
    """x (T, H) to (T, H); samples int32 (B + 1,), where they begin and end."""
    numbers = heads.query, heads.key, heads.key
    q, k, v = rotated_heads(x, w.input_norm, heads.epsilon, w.attention[0], cos, sin, numbers, 2)
    out = attend(q, k, v, samples, samples, max_length, causal=True)
    return _mlp(x + frozen_linear(out.flatten(1), w.out), w, heads)


def last_decoder_layer(
    x: torch.Tensor,
    x_tail: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    cos_tail: torch.Tensor,
    sin_tail: torch.Tensor,
    samples: torch.Tensor,
    tails: torch.Tensor,
    w: LayerWeights,
    heads: Heads,
    max_length: int,
) -> torch.Tensor:
    """x (T, H) and its tail rows x_tail (R, H) to the tail rows (R, H) of what `decoder_layer` gives."""
    k, v = rotated_heads(x, w.input_norm, heads.epsilon, w.attention[1], cos, sin, (heads.key, heads.key), 1)
    (q,) = rotated_heads(x_tail, w.input_norm, heads.epsilon, w.attention[0], cos_tail, sin_tail, (heads.query,), 1)
    out = attend(q, k, v, tails, samples, max_length, causal=True)
    return _mlp(x_tail + frozen_linear(out.flatten(1), w.out), w, heads)


def share_memory(*linears: nn.Linear) -> torch.Tensor:
    """One weight of several layers with the same input, one under the other; theirs become views of it."""
    whole = torch.cat([linear.weight.data for linear in linears])
    for linear, rows in zip(linears, torch.split(whole, [linear.out_features for linear in linears])):
        linear.weight.data = rows
    return whole


def layer_weights(layer: Any, last: bool, precision: str, device: torch.device) -> LayerWeights:
    """What the functions above read of one of Transformers' layers; values are shared, or made anew in 8 bits.

    Args:
        precision: one of `linear.PRECISIONS`.
    """
    a, m = layer.self_attn, layer.mlp
    form = PRECISIONS[precision]

    def kept(*linears: nn.Linear) -> Weight:
        for linear in linears:  # they wait on the host if the model was in 8 bits before
            linear.weight.data = linear.weight.data.to(device)
        whole = share_memory(*linears) if len(linears) > 1 else linears[0].weight.data
        if form is None:
            return whole
        made = form.of(whole)
        if form is Fp8Weight:
            for linear in linears:  # a copy on the host for captions and for the comparison with the manifest
                linear.weight.data = linear.weight.data.cpu()
        return made

    attention = (kept(a.q_proj), kept(a.k_proj, a.v_proj)) if last else (kept(a.q_proj, a.k_proj, a.v_proj),)
    norms = layer.input_layernorm.weight.data, layer.post_attention_layernorm.weight.data
    return LayerWeights(norms[0], attention, kept(a.o_proj), norms[1], kept(m.gate_proj, m.up_proj), kept(m.down_proj))


def named_linears(layers: Sequence[LayerWeights]) -> Iterator[tuple[str, Weight]]:
    for i, weights in enumerate(layers):
        for name, weight in weights.linears.items():
            yield f"{i}.{name}", weight


def is_known(decoder: PreTrainedModel, max_tokens: int) -> bool:
    """Whether `decoder_layer` computes what this decoder's layers do."""
    config, layers = decoder.config, getattr(decoder.get_decoder(), "layers", [])
    window = getattr(config, "sliding_window", None)
    return (
        len(layers) > 0
        and all(type(layer).__name__ in KNOWN_LAYERS for layer in layers)
        and all(m.bias is None for layer in layers for m in layer.modules() if isinstance(m, nn.Linear))
        and getattr(config, "hidden_act", "") == "silu"
        and (window is None or window >= max_tokens)
        and not any(p.requires_grad for p in decoder.parameters())
    )


@torch.no_grad()
def check_as_it_is(decoder: PreTrainedModel, max_length: int) -> None:
    """Compares logits of two made-up samples in a packed row with those of each by itself.

    Raises:
        RunError: they differ by more than rounding: samples see each other, or the decoder does to attention or to logits
            what is not done here.
    """
    name, device = type(decoder).__name__, decoder.device
    made = np.random.default_rng(0).integers(1, decoder.config.vocab_size, (2, CHECKED_TOKENS), np.int32)
    nothing = np.empty((0, 0), np.uint8)
    rows = pack(
        [Example(f"made up {i}", ids, 1, nothing, (0, 0)) for i, ids in enumerate(made)], image_token_id=-1, merge_size=1
    )
    rows = rows.to(device)
    try:
        states = decoder_states(decoder, decoder.get_input_embeddings()(rows.input_ids), rows, max_length)
    except (TypeError, ValueError, RuntimeError) as error:
        raise RunError(f"{name} does not run on packed rows of up to {max_length} tokens: {error}") from error
    ours = (states @ decoder.get_output_embeddings().weight.t()).float()
    with frozen.unpacked_attention(decoder):
        alone = [decoder(input_ids=ids[None], use_cache=False).logits[0].float() for ids in rows.input_ids.view(2, -1)]
    off = float((ours - torch.cat(alone)).norm() / torch.cat(alone).norm())
    if not off <= MOST_OFF[decoder.dtype] or getattr(decoder.config, "final_logit_softcapping", None):
        raise RunError(
            f"the logits of {name} in a packed row differ by {off:.2g} of themselves from those of each sample alone: its "
            "attention or its head does more than is done here; expected a decoder like Mistral, Llama or Qwen"
        )


# --- the tower -------------------------------------------------------------------------------------------------------


def tower_block(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    images: torch.Tensor,
    w: BlockWeights,
    heads: int,
    activation: Callable[[torch.Tensor], torch.Tensor],
    max_patches: int,
) -> torch.Tensor:
    """x (P, H) to (P, H); images int32 (I + 1,), where they begin and end."""
    qkv = F.linear(F.layer_norm(x, x.shape[-1:], *w.norm1, eps=1e-6), *w.qkv)
    q, k, v = qkv.view(len(x), 3, heads, -1).unbind(1)
    q, k = (rotate(t.float(), cos, sin).to(x.dtype) for t in (q, k))
    out = attend(q, k, v, images, images, max_patches, causal=False)
    x = x + F.linear(out.flatten(1), *w.out)
    inner = activation(F.linear(F.layer_norm(x, x.shape[-1:], *w.norm2, eps=1e-6), *w.fc1))
    return x + F.linear(inner, *w.fc2)


def block_weights(block: Any) -> BlockWeights:
    parts = block.norm1, block.attn.qkv, block.attn.proj, block.norm2, block.mlp.linear_fc1, block.mlp.linear_fc2
    return BlockWeights(*((part.weight.data, part.bias.data) for part in parts))


def patch_places(grid_thw: torch.Tensor, n_patches: int, merge: int) -> tuple[torch.Tensor, ...]:
    """Row, column, and the image's height and width of each patch in merge order, int64 (P,) each.

    Computed where the grid is and without waiting for it.
    """
    heights, widths = grid_thw[:, 1], grid_thw[:, 2]
    counts = heights * widths
    image = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts, output_size=n_patches)
    height, width = heights[image], widths[image]
    within = torch.arange(n_patches, device=counts.device) - (counts.cumsum(0) - counts)[image]
    block, inside = within // merge**2, within % merge**2
    blocks_across = width // merge
    row = block // blocks_across * merge + inside // merge
    column = block % blocks_across * merge + inside % merge
    return row, column, height, width


def tower_positions(places: tuple[torch.Tensor, ...], table: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The square table (side**2, H) of learned positions, stretched over each image bilinearly: (P, H)."""
    side = int(table.shape[0] ** 0.5)
    row, column, height, width = places

    def taps(index: torch.Tensor, size: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        at = index.float() * (side - 1) / (size - 1).clamp(min=1)
        low = at.floor().long()
        share = at - low
        return torch.stack((low, (low + 1).clamp(max=side - 1)), 1), torch.stack((1 - share, share), 1)

    (rows, row_shares), (columns, column_shares) = taps(row, height), taps(column, width)
    indices = (rows[:, :, None] * side + columns[:, None, :]).flatten(1)
    shares = (row_shares[:, :, None] * column_shares[:, None, :]).flatten(1)
    return (F.embedding(indices, table) * shares[:, :, None]).sum(1).to(dtype)


class PackedTower:
    """A frozen tower on images laid end to end; equals `modeling.tower_features` to rounding.

    Args:
        spec: what the images are cut by; none may be larger than it allows.
        compile_it: None: on a GPU with Triton.
    """

    def __init__(self, visual: Qwen3VLVisionModel, spec: ImageSpec, compile_it: bool | None = None) -> None:
        self.visual, self.spec = visual, spec
        self.compile_it = frozen.can_compile(visual.device) if compile_it is None else compile_it
        self.max_patches = spec.max_patches
        frozen.choose_varlen(visual.device)
        self.blocks = [block_weights(block) for block in visual.blocks]
        self.heads = visual.blocks[0].attn.num_heads
        self.activation = visual.blocks[0].mlp.act_fn
        embed = visual.patch_embed.proj
        # (H, C, frames, y, x): an image is one frame shown `frames` times, so the frames' weights act as their sum.
        wide = torch.promote_types(embed.weight.dtype, torch.float32)
        self.patch_weight = embed.weight.data.to(wide).sum(2).flatten(1)
        self.patch_bias = embed.bias.data.to(wide)

    @torch.no_grad()
    def features(
        self, patches: torch.Tensor, grid_thw: torch.Tensor, cu_patches: torch.Tensor, max_patches: int
    ) -> torch.Tensor:
        """Merged features (V, out_hidden).

        Args:
            patches: uint8 (P, 768); grid_thw: int64 (I, 3); cu_patches: int32 (I + 1,), where images begin and end.
            max_patches: of the largest image.

        Raises:
            RunError: an image is larger than the tower was prepared for.
        """
        if max_patches > self.max_patches:
            raise RunError(f"an image has {max_patches} patches; this tower was prepared for {self.max_patches}")
        places = patch_places(grid_thw, len(patches), self.spec.merge_size)
        pixels = normalize(patches, self.spec).to(self.patch_weight.dtype)
        x = F.linear(pixels, self.patch_weight, self.patch_bias).to(self.visual.dtype)
        x = x + tower_positions(places, self.visual.pos_embed.weight, x.dtype)
        cos, sin = self.visual.rotary_pos_emb(x, torch.stack(places[:2], 1))
        for weights in self.blocks:
            varying, fixed = (x, cos, sin, cu_patches), (weights, self.heads, self.activation, self.max_patches)
            x = on_rows(tower_block, self.compile_it, varying, *fixed)
        return self.visual.merger(x)  # type: ignore[no-any-return]


# --- both ------------------------------------------------------------------------------------------------------------


class PackedModel:
    """A model made ready for projector-only training.

    Args:
        max_tokens: of the longest sample; what the kernels are told, so that lengths never compile anything anew.
        precision: of the decoder's linear layers, one of `linear.PRECISIONS`. In fp8 their own weights wait on the host
            (`original_weights`).
        compile_it: None: on a GPU with Triton.

    Raises:
        RunError: fp8 is asked of a decoder or a device that cannot do it.
    """

    def __init__(
        self,
        model: ArtemisVLMForConditionalGeneration,
        spec: ImageSpec,
        max_tokens: int,
        *,
        precision: str = "dtype",
        compile_it: bool | None = None,
    ) -> None:
        self.model, self.spec = model, spec
        decoder: PreTrainedModel = model.language_model
        self.device = model.multi_modal_projector.fc1.weight.device
        self.compile_it = frozen.can_compile(self.device) if compile_it is None else compile_it
        self.pad_to = PAD_TO if self.device.type == "cuda" else 1
        self.max_length = max_tokens + self.pad_to - 1
        self.precision = precision
        self.tower = PackedTower(model.visual, spec, self.compile_it)
        self.layers: list[LayerWeights] = []
        config = decoder.config
        head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        frozen.choose_cudnn(self.device, head_size)
        if is_known(decoder, self.max_length):
            self._prepare_decoder(decoder)
        elif precision != "dtype":
            raise RunError(f"fp8 is for Mistral's and Llama's layers; {type(decoder).__name__} has others: drop fp8")
        else:
            logger.warning("%s has layers that are not written out here: they run as they are", type(decoder).__name__)
            frozen.use_packed_attention(decoder)
            check_as_it_is(decoder, self.max_length)

    def _prepare_decoder(self, decoder: PreTrainedModel) -> None:
        if form := PRECISIONS[self.precision]:
            try:
                check_fp8(form, self.device, self.compile_it)
            except ValueError as error:
                raise RunError(str(error)) from error
        layers = decoder.get_decoder().layers
        attention = layers[0].self_attn
        size = attention.head_dim
        self.heads = Heads(
            attention.q_proj.out_features // size,
            attention.k_proj.out_features // size,
            size,
            layers[0].input_layernorm.variance_epsilon,
        )
        self.layers = self._decoder_layers(self.precision)

    def _decoder_layers(self, precision: str) -> list[LayerWeights]:
        layers = self.model.language_model.get_decoder().layers
        return [layer_weights(layer, layer is layers[-1], precision, self.device) for layer in layers]

    def set_compiled(self, compile_it: bool) -> None:
        """Compiles the layers from now on, or not: the results differ in their last bits."""
        if compile_it and not self.compile_it and not frozen.can_compile(self.device):
            logger.warning("what was compiled goes on uncompiled: results differ in their last bits from here on")
            return
        self.compile_it = self.tower.compile_it = compile_it

    @contextmanager
    def exact(self) -> Iterator[None]:
        """Computes with the decoder's own weights for a while, those that the exported model has; float8 is for training."""
        in_8_bits = self.layers
        with self.original_weights():
            if self.precision == "fp8":
                self.layers = self._decoder_layers("dtype")
            try:
                yield
            finally:
                self.layers = in_8_bits

    @contextmanager
    def original_weights(self) -> Iterator[None]:
        """Brings weights that wait on the host back for a while, for what runs Transformers' own layers."""
        linears = [m for m in self.model.language_model.modules() if isinstance(m, nn.Linear)]
        waiting = [(linear, linear.weight.data) for linear in linears if linear.weight.device != self.device]
        for linear, weight in waiting:
            linear.weight.data = weight.to(self.device)
        try:
            yield
        finally:
            for linear, weight in waiting:
                linear.weight.data = weight  # unchanged: nothing is copied back

    @property
    def directions(self) -> dict[str, torch.Tensor]:
        """Those that the products in 8 bits take nearly exactly, by layer and kind; none in another precision."""
        return {n: w.directions for n, w in named_linears(self.layers) if isinstance(w, Fp8Weight)}

    @torch.no_grad()
    def find_directions(self, batch: PackedBatch) -> dict[str, torch.Tensor]:
        """The principal ones of what each linear layer is given where the decoder computes this batch in its own weights."""
        in_8_bits, compile_it = self.layers, self.compile_it
        with self.original_weights():
            exact = self._decoder_layers("dtype")
            probed = [w.with_linears({n: ProbedWeight(t, []) for n, t in w.linears.items()}) for w in exact]  # type: ignore[arg-type]
            self.layers, self.compile_it = probed, False
            try:
                self.loss(batch)
            finally:
                self.layers, self.compile_it = in_8_bits, compile_it
        return {name: w.found[0] for name, w in named_linears(probed) if isinstance(w, ProbedWeight)}

    @torch.no_grad()
    def take_directions(self, directions: Mapping[str, torch.Tensor]) -> None:
        """From now on computes nearly exactly in these, named as `directions` names them."""
        with self.original_weights():
            exact = dict(named_linears(self._decoder_layers("dtype")))
            for name, weight in named_linears(self.layers):
                if isinstance(weight, Fp8Weight):
                    weight.aim(exact[name], directions[name].to(self.device))  # type: ignore[arg-type]

    def features(self, batch: PackedBatch) -> torch.Tensor:
        """The tower's merged features (V, out_hidden)."""
        return self.tower.features(batch.patches, batch.grid_thw, batch.cu_patches, batch.max_patches)

    def loss(self, batch: PackedBatch) -> torch.Tensor:
        """Summed cross entropy of the supervised tokens, float32 scalar; the gradient reaches the projector only."""
        if batch.max_length > self.max_length:
            raise RunError(f"a sample has {batch.max_length} tokens; this model was prepared for {self.max_length}")
        decoder = self.model.language_model
        with torch.no_grad():
            embeds = decoder.get_input_embeddings()(batch.input_ids)
        if len(batch.image_index):
            image = self.model.project(self.features(batch)).to(embeds.dtype)
            embeds = embeds.index_copy(0, batch.image_index, image)
        states = self._supervised_states(embeds, batch)
        head = decoder.get_output_embeddings().weight
        return frozen_head_cross_entropy(states, head, batch.targets, compile_it=self.compile_it)

    def _supervised_states(self, x: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
        """Embeddings (T, H) to the normed last hidden states (S, H) that predict the targets."""
        decoder = self.model.language_model
        if not self.layers:
            return decoder_states(decoder, x, batch, self.max_length).index_select(0, batch.loss_index)
        base = decoder.get_decoder()
        cos, sin = (t[0] for t in base.rotary_emb(x[None], batch.position_ids[None]))
        for weights in self.layers[:-1]:
            fixed = weights, self.heads, self.max_length
            x = on_rows(decoder_layer, self.compile_it, (x, cos, sin, batch.cu_seqlens), *fixed)
        x_tail, cos_tail, sin_tail = (t.index_select(0, batch.tail_index) for t in (x, cos, sin))
        varying = x, x_tail, cos, sin, cos_tail, sin_tail, batch.cu_seqlens, batch.cu_tails
        x = on_rows(last_decoder_layer, self.compile_it, varying, self.layers[-1], self.heads, self.max_length)
        return base.norm(x.index_select(0, batch.loss_row))  # type: ignore[no-any-return]
