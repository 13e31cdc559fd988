"""Variable-length attention in cuDNN's kernels, through NVIDIA's package `nvidia-cudnn-frontend`.

Forward and backward they take two thirds of the time of those that torch has for it. (torch 2.11 can call them as well,
but makes a new plan at each call, 50 ms.) Under `torch.use_deterministic_algorithms` a gradient repeats itself to the
bit; it then works in 2 * C * N * max_length**2 bytes. Imported only where that package is; `frozen.choose_cudnn` decides.

Shape suffixes: T tokens, N heads, D head size, B samples, C room for samples.
"""

from __future__ import annotations

import enum
import functools
import threading
from collections.abc import Iterable, Sequence
from typing import Any, Final, NamedTuple

import cudnn  # type: ignore[import-not-found,unused-ignore]
import torch

#: A plan is for so many samples, some of which may be empty, and its gradient for so many tokens: rounded up to these,
#: for few plans to serve all batches.
ROOM, TOKENS = 4, 4096
_DTYPES: Final = {torch.bfloat16: cudnn.data_type.BFLOAT16, torch.float16: cudnn.data_type.HALF}
_FLOAT: Final = cudnn.data_type.FLOAT

Plan = tuple[Any, int]  # cuDNN's graph, and the bytes it works in


class Shape(NamedTuple):
    """What a plan depends on. Pairs are for queries and for keys; strides are those from token to token."""

    device: torch.device
    dtype: torch.dtype
    room: int
    tokens: tuple[int, int]
    heads: tuple[int, int]
    size: int
    strides: tuple[int, int, int]
    max_length: int
    ends_aligned: bool
    causal: bool
    scale: float

    @property
    def packed(self) -> tuple[int, int]:
        """Strides of outputs and gradients."""
        return self.heads[0] * self.size, self.heads[1] * self.size


class _Part(enum.IntEnum):
    """Tensors of a plan, by the numbers they have there."""

    QUERY, KEY, VALUE, OUT, STATS, D_OUT, D_QUERY, D_KEY, D_VALUE = range(1, 10)
    QUERY_LENGTHS, KEY_LENGTHS, QUERY_AT, OUT_AT, KEY_AT, VALUE_AT, PACKED_KEY_AT = range(10, 17)


_LENGTHS: Final = _Part.QUERY_LENGTHS, _Part.KEY_LENGTHS
_PLACES: Final = _Part.QUERY_AT, _Part.OUT_AT, _Part.KEY_AT, _Part.VALUE_AT, _Part.PACKED_KEY_AT


# --- plans -----------------------------------------------------------------------------------------------------------


class _Draft:
    """A plan being drawn up, with the inputs that forward and backward share."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.graph = cudnn.pygraph(
            handle=_handle(shape.device),
            io_data_type=_DTYPES[shape.dtype],
            intermediate_data_type=_FLOAT,
            compute_data_type=_FLOAT,
        )
        column = [1, 1, 1, 1]
        self.places = {p: self.tensor(p, [shape.room + 1, 1, 1, 1], column, cudnn.data_type.INT64) for p in _PLACES}
        lengths = (self.tensor(p, [shape.room, 1, 1, 1], column, cudnn.data_type.INT32) for p in _LENGTHS)
        self.options = {"use_padding_mask": True, "attn_scale": shape.scale}
        self.options |= dict(zip(("seq_len_q", "seq_len_kv"), lengths))
        if shape.causal:
            ends = cudnn.diagonal_alignment
            self.options |= {
                "diagonal_alignment": ends.BOTTOM_RIGHT if shape.ends_aligned else ends.TOP_LEFT,
                "diagonal_band_right_bound": 0,
            }
        self.options |= {
            name: self.packed(part, heads, stride, place)
            for name, part, heads, stride, place in zip(
                "qkv",
                (_Part.QUERY, _Part.KEY, _Part.VALUE),
                (shape.heads[0], shape.heads[1], shape.heads[1]),
                shape.strides,
                (_Part.QUERY_AT, _Part.KEY_AT, _Part.VALUE_AT),
            )
        }
        rows = shape.heads[0] * shape.max_length
        self.stats = [shape.room, shape.heads[0], shape.max_length, 1], [rows, shape.max_length, 1, 1]

    def tensor(self, part: _Part, dim: list[int], stride: list[int], dtype: Any) -> Any:
        return self.graph.tensor(name=part.name, dim=dim, stride=stride, data_type=dtype, uid=int(part))

    def layout(self, heads: int, stride: int) -> tuple[list[int], list[int]]:
        shape = self.shape
        return [shape.room, heads, shape.max_length, shape.size], [shape.max_length * stride, shape.size, stride, 1]

    def packed(self, part: _Part, heads: int, stride: int, place: _Part) -> Any:
        tensor = self.tensor(part, *self.layout(heads, stride), _DTYPES[self.shape.dtype])
        return tensor.set_ragged_offset(self.places[place])

    def made(self, tensor: Any, part: _Part, heads: int, stride: int, place: _Part) -> None:
        dim, strides = self.layout(heads, stride)
        tensor.set_uid(int(part)).set_output(True).set_dim(dim).set_stride(strides).set_data_type(_DTYPES[self.shape.dtype])
        tensor.set_ragged_offset(self.places[place])

    def plan(self) -> Plan:
        self.graph.validate()
        self.graph.build_operation_graph()
        self.graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
        self.graph.check_support()
        self.graph.build_plans()
        return self.graph, max(self.graph.get_workspace_size(), 1)


@functools.lru_cache(64)
def _forward_plan(shape: Shape) -> Plan:
    draft = _Draft(shape)
    out, stats = draft.graph.sdpa(name="attention", generate_stats=True, **draft.options)
    draft.made(out, _Part.OUT, shape.heads[0], shape.packed[0], _Part.OUT_AT)
    dim, stride = draft.stats
    stats.set_uid(int(_Part.STATS)).set_output(True).set_dim(dim).set_stride(stride).set_data_type(_FLOAT)
    return draft.plan()


@functools.lru_cache(64)
def _backward_plan(shape: Shape, deterministic: bool) -> Plan:
    draft = _Draft(shape)
    of_query, of_key = zip(shape.heads, shape.packed, (_Part.OUT_AT, _Part.PACKED_KEY_AT))
    gradients = draft.graph.sdpa_backward(
        name="attention_backward",
        o=draft.packed(_Part.OUT, *of_query),
        dO=draft.packed(_Part.D_OUT, *of_query),
        stats=draft.tensor(_Part.STATS, *draft.stats, _FLOAT),
        max_total_seq_len_q=shape.tokens[0],
        max_total_seq_len_kv=shape.tokens[1],
        use_deterministic_algorithm=deterministic,
        **draft.options,
    )
    for tensor, part, layout in zip(gradients, (_Part.D_QUERY, _Part.D_KEY, _Part.D_VALUE), (of_query, of_key, of_key)):
        draft.made(tensor, part, *layout)
    return draft.plan()


_local = threading.local()


def _handle(device: torch.device) -> Any:
    """This thread's, on its current stream: one handle must not serve two threads at a time."""
    handles: dict[torch.device, Any] = _local.__dict__.setdefault("handles", {})
    if device not in handles:
        with torch.cuda.device(device):
            handles[device] = cudnn.create_handle()
    cudnn.set_stream(handle=handles[device], stream=torch.cuda.current_stream(device).cuda_stream)
    return handles[device]


def _run(plan: Plan, shape: Shape, ends: torch.Tensor, *tensors: Iterable[tuple[_Part, torch.Tensor]]) -> None:
    """Args: ends: int32 (2, more than C), where samples end among queries and among keys, counted in tokens from a 0."""
    graph, size = plan
    query, key, value = shape.strides
    of_query = ends[0, :-1] * _factors(shape.device, query, shape.packed[0])
    of_key = ends[1, :-1] * _factors(shape.device, key, value, shape.packed[1])
    placed = zip(_LENGTHS, ends.diff()), zip(_PLACES, torch.cat((of_query, of_key)))
    workspace = torch.empty(size, dtype=torch.uint8, device=shape.device)
    addressed = {int(part): tensor for some in (*tensors, *placed) for part, tensor in some}
    graph.execute(addressed, workspace, handle=_handle(shape.device))


# --- the operator ----------------------------------------------------------------------------------------------------


def _columns(room: int) -> int:
    """Of `ends`: lengths and places made of them are rows that begin at multiples of 16 bytes, as cuDNN asks."""
    return (room + 4) // 4 * 4 + 1


def _up(count: int, unit: int) -> int:
    return (count + unit - 1) // unit * unit


@functools.cache
def _factors(device: torch.device, *strides: int) -> torch.Tensor:
    return torch.tensor(strides, device=device)[:, None]


def _shape(inputs: Sequence[torch.Tensor], room: int, tokens: tuple[int, int], *options: Any) -> Shape:
    query, key, value = inputs
    strides = query.stride(0), key.stride(0), value.stride(0)
    heads, size = (query.shape[1], key.shape[1]), query.shape[2]
    return Shape(query.device, query.dtype, room, tokens, heads, size, strides, *options)


def _heads_apart(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """(T, N, D) each, with the heads of a token one after the other, as plans have them."""
    return [t if t.stride()[1:] == (t.shape[2], 1) else t.contiguous() for t in tensors]


@torch.library.custom_op("artemis_vlm::cudnn_attention", mutates_args=())
def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_query: torch.Tensor,
    cu_key: torch.Tensor,
    max_length: int,
    ends_aligned: bool,
    causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`frozen.attend`, (T_q, N, D), and what its gradient needs.

    Args:
        ends_aligned: a sample has fewer queries than keys, and they are its last; else as many.

    Returns:
        That; of each query the logarithm of the sum of exponentials, float32 (C, N, max_length, 1); where samples end
        among queries and among keys, int32 (2, C and some more).
    """
    inputs, room = _heads_apart(query, key, value), _up(len(cu_query) - 1, ROOM)
    shape = _shape(inputs, room, (0, 0), max_length, ends_aligned, causal, scale)
    # Samples beyond the last are empty ones at its end.
    ends = torch.stack([torch.cat((cu, cu[-1:].expand(_columns(room) - len(cu)))) for cu in (cu_query, cu_key)])
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    stats = query.new_empty((room, shape.heads[0], max_length, 1), dtype=torch.float32)
    given = zip((_Part.QUERY, _Part.KEY, _Part.VALUE, _Part.OUT, _Part.STATS), (*inputs, out, stats))
    _run(_forward_plan(shape), shape, ends, given)
    return out, stats, ends


@attention.register_fake
def _(query: Any, key: Any, value: Any, cu_query: Any, cu_key: Any, max_length: int, *_: Any) -> Any:
    room = _up(cu_query.shape[0] - 1, ROOM)
    return (
        torch.empty_like(query, memory_format=torch.contiguous_format),
        query.new_empty((room, query.shape[1], max_length, 1), dtype=torch.float32),
        query.new_empty((2, _columns(room)), dtype=torch.int32),
    )


@torch.library.custom_op("artemis_vlm::cudnn_attention_backward", mutates_args=())
def attention_backward(
    slope: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    stats: torch.Tensor,
    ends: torch.Tensor,
    max_length: int,
    ends_aligned: bool,
    causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value where that of `attention`'s out is slope; the rest is what it took and gave."""
    inputs, tokens = _heads_apart(query, key, value), (_up(len(query), TOKENS), _up(len(key), TOKENS))
    shape = _shape(inputs, stats.shape[0], tokens, max_length, ends_aligned, causal, scale)
    gradients = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in inputs]
    given = zip((_Part.QUERY, _Part.KEY, _Part.VALUE, _Part.OUT, _Part.STATS), (*inputs, out.contiguous(), stats))
    made = zip((_Part.D_OUT, _Part.D_QUERY, _Part.D_KEY, _Part.D_VALUE), (slope.contiguous(), *gradients))
    _run(_backward_plan(shape, torch.are_deterministic_algorithms_enabled()), shape, ends, given, made)
    return gradients[0], gradients[1], gradients[2]


@attention_backward.register_fake
def _(slope: Any, query: Any, key: Any, value: Any, *_: Any) -> Any:
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (query, key, value))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:3], *output)
    ctx.mark_non_differentiable(*output[1:])
    ctx.options = inputs[5:]


def _gradients(ctx: Any, slope: torch.Tensor, *_: Any) -> tuple[Any, ...]:
    return *attention_backward(slope, *ctx.saved_tensors, *ctx.options), *(None,) * 6


attention.register_autograd(_gradients, setup_context=_save)
