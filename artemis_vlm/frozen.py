"""What makes training through frozen weights fast.

Attention over packed samples, linear layers that are never trained (in 8 bits if asked), and a cross entropy over a
frozen head that never holds all logits. Each replaces a plain expression that its docstring states and the tests compare
with.

Shape suffixes: T tokens, H hidden size, S supervised tokens, V vocabulary, N heads, D head size.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import flash_attention_mask

logger = logging.getLogger(__name__)

#: Name of `packed_attention` among Transformers' attention functions. It holds "flash" because that is how the vision
#: tower decides to hand on `cu_seqlens` instead of looping over images.
PACKED_ATTENTION: Final = "artemis_flash_packed"


def packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    is_causal: bool | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention within each sample of one packed row.

    Equals `softmax(q k^T * scaling + mask) v` with a mask that is -inf between samples and, if causal, above the
    diagonal. On CUDA one variable-length kernel; elsewhere one SDPA call a sample, which computes no masked block.

    Args:
        query: (1, N, T, D); key, value: (1, N_kv, T, D), N a multiple of N_kv.
        cu_seq_lens_q: int32 (B + 1,), where samples begin and end.
        max_length_q: at least the longest sample; a smaller one would leave rows unwritten.

    Returns:
        (1, T, N, D) and None.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if cu_seq_lens_q is None:
        raise ValueError(f"{PACKED_ATTENTION} needs cu_seq_lens_q; pass it with the packed batch")
    q, k, v = (t.squeeze(0).transpose(0, 1) for t in (query, key, value))
    out = attend(q, k, v, cu_seq_lens_q, cu_seq_lens_q, max_length_q, causal=causal, scale=scaling)
    return out.unsqueeze(0), None


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_query: torch.Tensor,
    cu_key: torch.Tensor,
    max_length: int | None,
    *,
    causal: bool,
    scale: float | None = None,
) -> torch.Tensor:
    """Attention within each sample; a sample's queries may be only its last ones.

    Equals `softmax(q k^T * scale + mask) v` with a mask that is -inf between samples and, if causal, after the query's
    own token, a sample's last query being its last token. On CUDA one variable-length kernel; elsewhere one SDPA call a
    sample, which computes no masked block, or in compiled code, which must not wait for lengths, one with that mask.

    Args:
        query: (T_q, N, D); key, value: (T, N_kv, D), N a multiple of N_kv.
        cu_query, cu_key: int32 (B + 1,), where samples begin and end among the queries and among the keys.
        max_length: at least the longest sample; a smaller one would leave rows unwritten. A constant over batches keeps
            a compiled caller from being compiled again.

    Returns:
        (T_q, N, D).
    """
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and _VARLEN != "absent":
        if max_length is None:
            raise ValueError("the variable-length kernel needs max_length, at least the longest sample")
        return _varlen(query, key, value, cu_query, cu_key, max_length, causal, scale)
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    if torch.compiler.is_compiling():
        q, k, v = (t.transpose(0, 1)[None] for t in (query, key, value))
        mask = block_mask(cu_query, len(query), cu_key, len(key), causal)
        return F.scaled_dot_product_attention(q, k, v, mask, scale=scale)[0].transpose(0, 1)
    return _attend_each(query, key, value, cu_query, cu_key, causal, scale)


def block_mask(cu_query: torch.Tensor, n_query: int, cu_key: torch.Tensor, n_key: int, causal: bool) -> torch.Tensor:
    """bool (n_query, n_key): whether a query may see a key, as `attend` says."""

    def places(ends: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        at = torch.arange(count, device=ends.device, dtype=ends.dtype)
        sample = torch.searchsorted(ends[1:].contiguous(), at, right=True)
        return sample, ends[1:][sample] - at  # its sample, and how far from its end

    (sample_q, left_q), (sample_k, left_k) = places(cu_query, n_query), places(cu_key, n_key)
    mask = sample_q[:, None] == sample_k
    return mask & (left_q[:, None] <= left_k) if causal else mask


def _attend_each(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_query: torch.Tensor,
    cu_key: torch.Tensor,
    causal: bool,
    scale: float | None,
) -> torch.Tensor:
    outputs = []
    lengths = cu_query.diff().tolist(), cu_key.diff().tolist()
    samples = torch.split(query, lengths[0]), torch.split(key, lengths[1]), torch.split(value, lengths[1])
    for q, k, v in zip(*(tuple(t.transpose(0, 1)[None] for t in parts) for parts in samples)):
        mask = None
        if causal and q.shape[2] != k.shape[2]:  # SDPA's own causal mask starts at the first key
            mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(k.shape[2] - q.shape[2])
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal and mask is None, scale=scale)
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs)


def _varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_query: torch.Tensor,
    cu_key: torch.Tensor,
    max_length: int,
    causal: bool,
    scale: float | None,
) -> torch.Tensor:
    options: dict[str, Any] = {"window_size": (-1, 0) if causal else (-1, -1), "scale": scale}
    if (groups := query.shape[1] // key.shape[1]) > 1:
        if _VARLEN == "named":
            options["enable_gqa"] = True
        elif _VARLEN == "repeated":
            key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
    out: Any = varlen_attn(query, key, value, cu_query, cu_key, max_length, max_length, **options)
    return out  # type: ignore[no-any-return]


#: How the variable-length kernel takes fewer key heads than query heads: `named` by its option, `unnamed` without one
#: (torch 2.11 has no option), `repeated` by copies of the keys; `absent`: there is no such kernel for this device.
#: `choose_varlen` finds out.
_VARLEN = "repeated"


def choose_varlen(device: torch.device) -> str:
    """Settles how `attend` uses the variable-length kernel of a GPU: the first way that gives the right numbers; logs it."""
    global _VARLEN
    if device.type != "cuda":
        return "absent"
    grouped = "named" if "enable_gqa" in inspect.signature(varlen_attn).parameters else "unnamed"
    for _VARLEN in (grouped, "repeated"):
        try:
            if _varlen_is_right(device):
                break
            logger.info("the variable-length kernel gives other numbers with grouped heads %s", _VARLEN)
        except (RuntimeError, ValueError, NotImplementedError) as error:
            logger.info("the variable-length kernel refuses grouped heads %s: %s", _VARLEN, error)
    else:
        _VARLEN = "absent"
    logger.info("variable-length attention on %s: grouped heads %s", torch.cuda.get_device_name(device), _VARLEN)
    return _VARLEN


def _varlen_is_right(device: torch.device) -> bool:
    """Whether output and gradients with 2 key heads for 4 query heads, some queries left out, are those of SDPA."""
    made = torch.Generator(device).manual_seed(0)
    queries, keys = (torch.tensor(ends, dtype=torch.int32, device=device) for ends in ((0, 24, 80), (0, 40, 96)))
    shapes = (80, 4, 64), (96, 2, 64), (96, 2, 64)
    values = [torch.randn(shape, device=device, generator=made).bfloat16() for shape in shapes]

    def results(attention: Callable[..., torch.Tensor], *last: Any, dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [value.to(dtype).requires_grad_() for value in values]
        out = attention(*leaves, queries, keys, *last)
        return [out.detach(), *torch.autograd.grad(out.float().square().sum(), leaves)]

    def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *ends: torch.Tensor) -> torch.Tensor:
        k, v = (t.repeat_interleave(2, 1) for t in (k, v))
        return _attend_each(q, k, v, ends[0], ends[1], True, None)

    ours, theirs = results(_varlen, 64, True, None, dtype=torch.bfloat16), results(plain, dtype=torch.float32)
    return all(bool((a.float() - b).norm() <= 0.02 * b.norm()) for a, b in zip(ours, theirs))


def compute_dtype(device: torch.device | str) -> torch.dtype:
    """What a model of bfloat16 weights computes in fastest: bfloat16, but float32 on CPUs that would emulate it.

    Without AVX512-BF16, AMX or their Arm counterpart a bfloat16 product takes 8 times as long as a float32 one.
    """
    if torch.device(device).type != "cpu":
        return torch.bfloat16
    features = torch.cpu.get_capabilities()
    fast = any(features.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return torch.bfloat16 if fast else torch.float32


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
AttentionMaskInterface.register(PACKED_ATTENTION, flash_attention_mask)


@functools.cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function compiled, once a process. Callers mark what varies with `mark_rows`."""
    return torch.compile(function)


def mark_rows(*tensors: torch.Tensor) -> None:
    """Says that the first dimension varies from call to call, so that a compiled function is compiled for all lengths."""
    for tensor in tensors:
        if len(tensor) > 1:  # one row is always a case of its own
            torch._dynamo.mark_dynamic(tensor, 0)


def can_compile(device: torch.device) -> bool:
    """Whether `torch.compile` pays here: on a GPU with Triton. Logs by name where it is missing."""
    if device.type != "cuda":
        return False
    try:
        import triton  # type: ignore[import-not-found,unused-ignore]  # noqa: F401
    except ImportError:
        logger.warning("no Triton here: the frozen layers run uncompiled, at about two thirds of the speed")
        return False
    return True


# --- frozen linear layers --------------------------------------------------------------------------------------------


class Fp8Weight(NamedTuple):
    """A frozen weight (out, in) in float8 e4m3, in the two layouts that forward and backward products read.

    rows: (out, in), scaled by row_scales float32 (out, 1); columns: (in, out), scaled by column_scales float32 (in, 1)
    """

    rows: torch.Tensor
    row_scales: torch.Tensor
    columns: torch.Tensor
    column_scales: torch.Tensor

    @classmethod
    def of(cls, weight: torch.Tensor) -> Fp8Weight:
        return cls(*quantize_rows(weight), *quantize_rows(weight.t().contiguous()))


class Fp8BackwardWeight(NamedTuple):
    """A frozen weight (out, in) for forward products in its own dtype and backward ones in float8 e4m3.

    columns: (in, out), scaled by column_scales float32 (in, 1)
    """

    weight: torch.Tensor
    columns: torch.Tensor
    column_scales: torch.Tensor

    @classmethod
    def of(cls, weight: torch.Tensor) -> Fp8BackwardWeight:
        return cls(weight, *quantize_rows(weight.t().contiguous()))


Weight = torch.Tensor | Fp8Weight | Fp8BackwardWeight
#: What a decoder's frozen linear layers may compute in while training, and the form of weight that does it.
PRECISIONS: Final[dict[str, type[Fp8Weight] | type[Fp8BackwardWeight] | None]] = {
    "dtype": None,
    "fp8": Fp8Weight,
    "fp8-backward": Fp8BackwardWeight,
}
FP8: Final = torch.float8_e4m3fn
FP8_MAX: Final = 448.0


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(R, C) to float8 e4m3 (R, C) and float32 scales (R, 1), each row's largest value becoming 448.

    A value is off by at most 1/16 of itself, or by scale / 1024 where it is small. A row with a NaN or an infinity gives
    NaN throughout: nothing non-finite can pass for a number.
    """
    scale = x.abs().amax(-1, keepdim=True).float().clamp(min=1e-12) / FP8_MAX
    return (x.float() / scale).to(FP8), scale


def _fp8_product(x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, fast: bool = False) -> torch.Tensor:
    """Args: fast: sums in the tensor cores' own precision, which truncates. It biases a gradient: training ends worse."""
    quantized, x_scales = quantize_rows(x)
    product: torch.Tensor = torch._scaled_mm(
        quantized, weight.t(), scale_a=x_scales, scale_b=scales.t(), out_dtype=torch.bfloat16, use_fast_accum=fast
    )
    return product.to(x.dtype)


class _Fp8Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        rows: torch.Tensor,
        row_scales: torch.Tensor,
        columns: torch.Tensor,
        column_scales: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(columns, column_scales)
        return _fp8_product(x, rows, row_scales, fast=True)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        return _fp8_product(grads[0], *ctx.saved_tensors), None, None, None, None


class _Fp8BackwardLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, columns: torch.Tensor, column_scales: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(columns, column_scales)
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return _fp8_product(grads[0], *ctx.saved_tensors), None, None, None


# In the graph as they are: where torch 2.11's dynamo looks into such a function, it takes the product in 8 bits for a
# constant and compiles a backward of zeros.
@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]
def _fp8_linear(x: torch.Tensor, *weight: torch.Tensor) -> torch.Tensor:
    return _Fp8Linear.apply(x, *weight)  # type: ignore[no-any-return,no-untyped-call]


@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]
def _fp8_backward_linear(x: torch.Tensor, *weight: torch.Tensor) -> torch.Tensor:
    return _Fp8BackwardLinear.apply(x, *weight)  # type: ignore[no-any-return,no-untyped-call]


def frozen_linear(x: torch.Tensor, weight: Weight) -> torch.Tensor:
    """`x @ weight.t()` with a gradient for x alone; nothing but the weight is kept for it.

    With an `Fp8Weight` both operands of both products are float8 with a scale a row, sums are float32 (on a GPU the
    forward ones in its tensor cores' own precision), and the result is rounded to bfloat16: each value is within
    (1/8 + 1/128) * (|x| @ |weight|.t()) of the exact one, plus what underflows. With an `Fp8BackwardWeight` that holds for
    the gradient alone, and the product is the plain one.

    Args:
        x: (T, in); weight: (out, in).
    """
    product: torch.Tensor
    if isinstance(weight, Fp8Weight):
        product = _fp8_linear(x, *weight)
    elif isinstance(weight, Fp8BackwardWeight):
        product = _fp8_backward_linear(x, *weight)
    else:
        product = F.linear(x, weight)
    return product


def check_fp8(form: type[Fp8Weight] | type[Fp8BackwardWeight], device: torch.device, compile_it: bool = False) -> None:
    """Raises ValueError, with the reason, where scaled float8 products do not run or pass back a wrong gradient."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    x = torch.ones(32, 32, dtype=torch.bfloat16, device=device, requires_grad=True)
    linear = compiled(frozen_linear) if compile_it else frozen_linear
    try:
        y = linear(x, form.of(x.detach()))
        (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y))
    except (RuntimeError, NotImplementedError) as error:
        raise ValueError(f"{name} does not run float8 products ({error}); use --frozen-precision dtype") from error
    if not (y == 32).all() or not (gradient == 32).all():
        raise ValueError(f"float8 products are wrong on {name} with torch {torch.__version__}; use --frozen-precision dtype")


# --- the frozen head -------------------------------------------------------------------------------------------------


def _chunk_loss(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed cross entropy of some rows, and its gradient with respect to the logits, in their dtype. May overwrite them."""
    dtype = logits.dtype
    logits = logits.float()
    target = targets[:, None]
    log_sum = torch.logsumexp(logits, -1, keepdim=True)
    log_likelihood = logits.gather(1, target) - log_sum
    slope = logits.sub_(log_sum).exp_().to(dtype)
    slope.scatter_(1, target, (log_likelihood.exp() - 1).to(dtype))
    return -log_likelihood.sum(), slope


class _FrozenHeadCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, chunk: int, compile_it: bool
    ) -> torch.Tensor:
        chunk_loss = compiled(_chunk_loss) if compile_it else _chunk_loss
        gradient = torch.empty_like(hidden)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        parts = -(-len(targets) // chunk)
        for rows, target, out in zip(*(t.tensor_split(parts) for t in (hidden, targets, gradient))):
            logits = rows @ weight.t()
            if compile_it:
                mark_rows(logits, target)
            loss, slope = chunk_loss(logits, target)
            total += loss
            torch.mm(slope, weight, out=out)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0].to(gradient.dtype), None, None, None, None


def frozen_head_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, chunk: int = 2048, compile_it: bool = False
) -> torch.Tensor:
    """Summed cross entropy over a head that is not trained, `chunk` rows of logits at a time.

    Equals `F.cross_entropy((hidden @ weight.t()).float(), targets, reduction="sum")`; the gradient of `hidden` is
    computed on the way and that of `weight` never.

    Args:
        hidden: (S, H); weight: (V, H) of the same dtype; targets: int64 (S,).
        compile_it: fuses what is done to a chunk's logits.

    Returns:
        float32 scalar.
    """
    total: torch.Tensor = _FrozenHeadCrossEntropy.apply(hidden, weight, targets, chunk, compile_it)  # type: ignore[no-untyped-call]
    return total


# --- transformers' own layers on packed rows -------------------------------------------------------------------------


@contextmanager
def unpacked_attention(*models: PreTrainedModel) -> Iterator[None]:
    """Lets models take padded batches for a while, as `generate` gives them, with SDPA."""
    before = [model.config._attn_implementation for model in models]
    for model in models:
        model.config._attn_implementation = "sdpa"
    try:
        yield
    finally:
        for model, implementation in zip(models, before):
            model.config._attn_implementation = implementation


def use_packed_attention(*models: PreTrainedModel) -> None:
    """Switches models to `packed_attention`; they then take packed rows only."""
    for model in models:
        # Not through set_attn_implementation: on seeing "flash" it goes looking for the flash-attn package.
        model.config._attn_implementation = PACKED_ATTENTION
