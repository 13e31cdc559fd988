"""The decoder's frozen linear layers: in their own dtype, or in float8 e4m3 with what float8 loses most put back.

The inputs of a decoder's layers lie mostly in a few directions, the same for all tokens. Rounded to 8 bits, that part
errs the same way everywhere, and a projector trained so learns the errors. An `Fp8Weight` therefore multiplies the part
of x in `DIRECTIONS` principal directions P nearly exactly, and only the rest in 8 bits:

    x @ W.t()  =  (x - s @ P.t()) @ W.t()  +  s @ (W @ P).t(),    s = x @ P

s and W @ P are each two float8 numbers, high and low, and stand as further columns beside the rest and W, so that one
product in 8 bits does it all. That is an identity for any P; a good one makes the rest small.

Shape suffixes: T tokens, K inputs.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import torch
import torch.nn.functional as F

from artemis_vlm import frozen

logger = logging.getLogger(__name__)

FP8: Final = torch.float8_e4m3fn
FP8_MAX: Final = 448.0
#: Scale over the length of a row, with room for directions that are orthonormal to bfloat16.
SLACK: Final = 1.01 / FP8_MAX
#: Principal directions of an `Fp8Weight`. Two numbers for each on both sides make 4 * 32 columns: cuBLAS is 26 to 40 %
#: slower where their number is no multiple of 128.
DIRECTIONS: Final = 32
#: Rows that are enough to find them from: more than 4 samples made no difference.
DIRECTION_ROWS: Final = 4096
#: Rounds of subspace iteration.
ROUNDS: Final = 3


# --- the forms of a weight -------------------------------------------------------------------------------------------


class Fp8Weight(NamedTuple):
    """A frozen weight W (out, in) in float8 e4m3, in the two layouts that forward and backward products read.

    rows: (out, in + 4 * DIRECTIONS), W and then W @ P in two parts, scaled by row_scales float32 (out, 1)
    columns: (in, out), scaled by column_scales float32 (in, 1)
    directions: bfloat16 (in, DIRECTIONS), P, orthonormal; zero until `aim`, which leaves plain 8 bits
    """

    rows: torch.Tensor
    row_scales: torch.Tensor
    columns: torch.Tensor
    column_scales: torch.Tensor
    directions: torch.Tensor

    @classmethod
    def of(cls, weight: torch.Tensor) -> Fp8Weight:
        directions = torch.zeros(weight.shape[1], DIRECTIONS, dtype=torch.bfloat16, device=weight.device)
        return cls(*_rows(weight, directions), *quantize_rows(weight.t().contiguous()), directions)

    def aim(self, weight: torch.Tensor, directions: torch.Tensor) -> None:
        """Takes other directions, in place. Args: weight: that this is made of."""
        for mine, new in zip((self.rows, self.row_scales, self.directions), (*_rows(weight, directions), directions)):
            mine.copy_(new)


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


class ProbedWeight(NamedTuple):
    """A frozen weight (out, in) in its own dtype that finds the principal directions of what it is multiplied with."""

    weight: torch.Tensor
    found: list[torch.Tensor]


Weight = torch.Tensor | Fp8Weight | Fp8BackwardWeight | ProbedWeight
#: What a decoder's frozen linear layers may compute in while training, and the form of weight that does it.
PRECISIONS: Final[dict[str, type[Fp8Weight] | type[Fp8BackwardWeight] | None]] = {
    "dtype": None,
    "fp8": Fp8Weight,
    "fp8-backward": Fp8BackwardWeight,
}


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(R, C) to float8 e4m3 (R, C) and float32 scales (R, 1), each row's largest value becoming 448.

    A value is off by at most 1/16 of itself, or by scale / 1024 where it is small. A row with a NaN or an infinity gives
    NaN throughout: nothing non-finite can pass for a number.
    """
    scale = x.abs().amax(-1, keepdim=True).float().clamp(min=1e-12) / FP8_MAX
    return (x.float() / scale).to(FP8), scale


def split_rows(x: torch.Tensor, directions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What an `Fp8Weight` multiplies: float8 (T, K + 4 * DIRECTIONS), and scales float32 (T, 1).

    A value of the rest of x (T, K) is off by at most 1/16 of itself, or by scale / 1024 where it is small; one of s by
    1/256, or the same. A scale is the row's length over 443: neither the rest nor s is longer than the row, and a float8
    loses nothing by being far from its largest value. `split_kernel` computes the same.
    """
    along = (x @ directions.to(x.dtype)).bfloat16().float()
    wide = x.float()
    scale = (wide.norm(dim=-1, keepdim=True) * SLACK).clamp(min=1e-12)
    high, low = _two_parts(along / scale)
    return torch.cat((((wide - along @ directions.float().t()) / scale).to(FP8), high, low, high, low), -1), scale


def _rows(weight: torch.Tensor, directions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    wide = weight.float()
    along = wide @ directions.float()
    scale = torch.cat((wide, along), -1).abs().amax(-1, keepdim=True).clamp(min=1e-12) / FP8_MAX
    high, low = _two_parts(along / scale)
    return torch.cat(((wide / scale).to(FP8), high, high, low, low), -1), scale


def _two_parts(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    high = x.to(FP8)
    return high, (x - high.float()).to(FP8)


def principal_directions(x: torch.Tensor) -> torch.Tensor:
    """Of the rows of x (T, K): bfloat16 (K, DIRECTIONS), orthonormal; zero columns where K is smaller.

    By subspace iteration from the same start each time (Halko, Martinsson and Tropp 2011, algorithm 4.4).
    """
    x = x[:DIRECTION_ROWS].float()
    start = torch.randn(x.shape[1], DIRECTIONS, generator=torch.Generator().manual_seed(0))
    basis = start.to(x.device)
    for _ in range(ROUNDS):
        basis = torch.linalg.qr(x.t() @ (x @ basis)).Q
    return F.pad(basis, (0, DIRECTIONS - basis.shape[1])).bfloat16().contiguous()


# --- their products --------------------------------------------------------------------------------------------------


def _scaled_product(
    x: tuple[torch.Tensor, torch.Tensor], weight: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype, fast: bool
) -> torch.Tensor:
    """In 8 bits, rounded to bfloat16 and then to dtype.

    Args:
        fast: sums in the tensor cores' own precision, which truncates; 8 to 27 % faster on an H100, product by product.
            Of random terms 0.02 % is lost over 6,144 of them and 0.08 % over 28,672, where rounding to 8 bits errs by
            3.7 %; of terms of one sign 1 % and 7 %.
    """
    product: torch.Tensor = torch._scaled_mm(
        x[0], weight.t(), scale_a=x[1], scale_b=scales.t(), out_dtype=torch.bfloat16, use_fast_accum=fast
    )
    return product.to(dtype)


def _gradient(slope: torch.Tensor, columns: torch.Tensor, column_scales: torch.Tensor) -> torch.Tensor:
    return _scaled_product(quantize_rows(slope), columns, column_scales, slope.dtype, fast=True)


def _forward(
    x: torch.Tensor | None, source: torch.Tensor, norm: torch.Tensor | None, epsilon: float, weight: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Of an `Fp8Weight` or an `Fp8BackwardWeight`.

    Args:
        x: None: silu of the first half of source times the second.
        source, norm, epsilon: what x is made of, for the kernel that reads that.
    """
    exact = len(weight) == len(Fp8BackwardWeight._fields)
    kernel = None if exact else _kernel(source.device, "split_rows")
    if kernel:
        split = kernel.split_rows(source, norm, epsilon, weight[4], SLACK)
    else:
        x = _gated(source) if x is None else x
        if exact:
            return F.linear(x, weight[0])
        split = split_rows(x, weight[4])
    return _scaled_product(split, weight[0], weight[1], source.dtype, fast=True)


def _columns(weight: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """What the gradient needs of either form: columns and their scales."""
    return weight[1:] if len(weight) == len(Fp8BackwardWeight._fields) else weight[2:4]


def _gated(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def gate_gradient(slope: torch.Tensor, gate_up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantize_rows` of the gradient of gate_up (T, 2 * in) where that of silu(gate) * up is slope (T, in).

    Compiled code reads every row six times for it; `split_kernel` computes the same and reads it once.
    """
    gate, up = gate_up.float().chunk(2, -1)
    share = torch.sigmoid(gate)
    wide = slope.float()
    return quantize_rows(torch.cat((wide * up * share * (1 + gate * (1 - share)), wide * gate * share), -1))


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding of x (T, N, D); cos and sin (T, D)."""
    first, second = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None]


def rotary_gradient(
    slopes: list[torch.Tensor], cos: torch.Tensor, sin: torch.Tensor, rotated: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantize_rows` of the gradient of heads that are rotated by `rotate` or left as they are.

    Compiled code writes it and reads it twice; `split_kernel` computes the same and does not.

    Args:
        slopes: gradients of heads (T, N, D), one behind the other in what is returned; the first `rotated` of them are of
            heads that are rotated.
    """
    parts = [slope.float() for slope in slopes]
    for i in range(rotated):
        along, across = parts[i] * cos[:, None], parts[i] * sin[:, None]
        first, second = across.chunk(2, -1)
        parts[i] = along + torch.cat((second, -first), -1)
    return quantize_rows(torch.cat(parts, 1).flatten(1))


def _heads(
    whole: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, numbers: Sequence[int], rotated: int
) -> list[torch.Tensor]:
    parts = torch.split(whole.view(whole.shape[0], -1, cos.shape[-1]), list(numbers), 1)
    return [rotate(part, cos, sin) if i < rotated else part for i, part in enumerate(parts)]


class _Fp8Linear(torch.autograd.Function):
    """Of an `Fp8Weight` or an `Fp8BackwardWeight`. Where the kernel reads what x is made of, x is for its gradient alone."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, source: torch.Tensor, norm: torch.Tensor | None, epsilon: float, *weight: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(*_columns(weight))
        ctx.count = len(weight)
        return _forward(x, source, norm, epsilon, weight)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _gradient(grads[0], *ctx.saved_tensors), *(None,) * (3 + ctx.count)


class _Fp8Heads(torch.autograd.Function):
    """`rotated_heads` of one weight, as above."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        source: torch.Tensor,
        norm: torch.Tensor,
        epsilon: float,
        cos: torch.Tensor,
        sin: torch.Tensor,
        numbers: Sequence[int],
        rotated: int,
        *weight: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        ctx.save_for_backward(cos, sin, *_columns(weight))
        ctx.rotated, ctx.count = rotated, len(weight)
        return tuple(_heads(_forward(x, source, norm, epsilon, weight), cos, sin, numbers, rotated))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cos, sin, columns, column_scales = ctx.saved_tensors
        kernel = _kernel(cos.device, "rotary_gradient")
        rounded = (kernel.rotary_gradient if kernel else rotary_gradient)(list(grads), cos, sin, ctx.rotated)
        return _scaled_product(rounded, columns, column_scales, grads[0].dtype, fast=True), *(None,) * (7 + ctx.count)


class _Fp8Mlp(torch.autograd.Function):
    """`gated_mlp` of two weights in the same form, as above."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, source: torch.Tensor, norm: torch.Tensor, epsilon: float, *weights: torch.Tensor
    ) -> torch.Tensor:
        first, second = weights[: len(weights) // 2], weights[len(weights) // 2 :]
        gate_up = _forward(x, source, norm, epsilon, first)
        ctx.save_for_backward(gate_up, *_columns(first), *_columns(second))
        ctx.count = len(weights)
        return _forward(None, gate_up, None, 0.0, second)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gate_up, columns, column_scales, *down = ctx.saved_tensors
        slope = _gradient(grads[0], *down)
        kernel = _kernel(slope.device, "gate_gradient")
        rounded = (kernel.gate_gradient if kernel else gate_gradient)(slope, gate_up)
        # The longest sums, and no faster in that way.
        return _scaled_product(rounded, columns, column_scales, slope.dtype, fast=False), *(None,) * (3 + ctx.count)


# In the graph as they are: where torch 2.11's dynamo looks into such a function, it takes the product in 8 bits for a
# constant and compiles a backward of zeros.
@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]
def _fp8_linear(*args: Any) -> torch.Tensor:
    return _Fp8Linear.apply(*args)  # type: ignore[no-any-return,no-untyped-call]


@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]
def _fp8_heads(*args: Any) -> tuple[torch.Tensor, ...]:
    return _Fp8Heads.apply(*args)  # type: ignore[no-any-return,no-untyped-call]


@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]
def _fp8_mlp(*args: Any) -> torch.Tensor:
    return _Fp8Mlp.apply(*args)  # type: ignore[no-any-return,no-untyped-call]


def frozen_linear(x: torch.Tensor, weight: Weight) -> torch.Tensor:
    """`x @ weight.t()` with a gradient for x alone; nothing but the weight is kept for it.

    In 8 bits both operands are float8 with a scale a row, sums are float32 (on a GPU the forward ones in its tensor
    cores' own precision), and the result is rounded to bfloat16. With an `Fp8BackwardWeight` that holds for the gradient
    alone, and the product is the plain one. A gradient is within (1/8 + 1/128) * (|slope| @ |weight|) of the exact one,
    plus what underflows; a product of an `Fp8Weight` within that of the rest of x (see above) and weight, plus 1/64 of
    |s| @ |weight @ P|.t() and 1/256 of itself.

    Args:
        x: (T, in); weight: (out, in).
    """
    if isinstance(weight, Fp8Weight | Fp8BackwardWeight):
        return _fp8_linear(x, x.detach(), None, 0.0, *weight)  # type: ignore[no-any-return]
    return _plain_linear(x, weight)


def normed_linear(x: torch.Tensor, norm: torch.Tensor, epsilon: float, weight: Weight) -> torch.Tensor:
    """`frozen_linear(rms_norm(x, norm, epsilon), weight)`; x (T, in), norm (in,)."""
    normed = rms_norm(x, norm, epsilon)
    if isinstance(weight, Fp8Weight | Fp8BackwardWeight):
        return _fp8_linear(normed, x.detach(), norm, epsilon, *weight)  # type: ignore[no-any-return]
    return _plain_linear(normed, weight)


def rotated_heads(
    x: torch.Tensor,
    norm: torch.Tensor,
    epsilon: float,
    weight: Weight,
    cos: torch.Tensor,
    sin: torch.Tensor,
    numbers: Sequence[int],
    rotated: int,
) -> Sequence[torch.Tensor]:
    """Of `normed_linear(x, norm, epsilon, weight)` heads (T, N, D), for each N in numbers; the first `rotated` are rotated.

    Args:
        x: (T, in); norm: (in,); weight: (sum of numbers * D, in); cos, sin: (T, D).
    """
    if isinstance(weight, Fp8Weight | Fp8BackwardWeight):
        normed = rms_norm(x, norm, epsilon)
        return _fp8_heads(normed, x.detach(), norm, epsilon, cos, sin, numbers, rotated, *weight)  # type: ignore[no-any-return]
    return _heads(normed_linear(x, norm, epsilon, weight), cos, sin, numbers, rotated)


def gated_mlp(x: torch.Tensor, norm: torch.Tensor, epsilon: float, gate_up: Weight, down: Weight) -> torch.Tensor:
    """`frozen_linear(silu(gate) * up, down)`, gate and up being the halves of `normed_linear(x, norm, epsilon, gate_up)`.

    Both weights in the same form; x (T, H), norm (H,), gate_up (2 * inner, H), down (H, inner).
    """
    if isinstance(gate_up, Fp8Weight | Fp8BackwardWeight):
        return _fp8_mlp(rms_norm(x, norm, epsilon), x.detach(), norm, epsilon, *gate_up, *down)  # type: ignore[no-any-return]
    return frozen_linear(_gated(normed_linear(x, norm, epsilon, gate_up)), down)


def _plain_linear(x: torch.Tensor, weight: torch.Tensor | ProbedWeight) -> torch.Tensor:
    if isinstance(weight, ProbedWeight):
        weight.found.append(principal_directions(x))
        return F.linear(x, weight.weight)
    return F.linear(x, weight)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)).to(x.dtype)


# --- what a device can do --------------------------------------------------------------------------------------------


@functools.cache
def _kernel(device: torch.device, what: str) -> Any:
    """The module that does this of `_ERRORS` on this device, or None for the plain expression. Logs that."""
    if not frozen.can_compile(device):
        return None
    from artemis_vlm import split_kernel

    try:
        error = _ERRORS[what](split_kernel, device)
    except Exception as failed:  # Triton has no exceptions of its own for what a device cannot do
        error = f"{type(failed).__name__}: {failed}"
    if error:
        logger.warning("the kernel for %s is not used on %s: %s", what, torch.cuda.get_device_name(device), error)
    return None if error else split_kernel


def _made(device: torch.device, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    made = torch.Generator(device).manual_seed(0)
    return [torch.randn(shape, generator=made, device=device).bfloat16() for shape in shapes]


def _difference(ours: tuple[torch.Tensor, torch.Tensor], plain: tuple[torch.Tensor, torch.Tensor]) -> str:
    mine, theirs = (values.float() * scale for values, scale in (ours, plain))
    error = (mine - theirs).norm() / theirs.norm()
    return "" if error < 0.01 else f"it is off by {error:.2g}"


def _gate_error(kernel: Any, device: torch.device) -> str:
    inputs = _made(device, (96, 192), (96, 384))
    return _difference(kernel.gate_gradient(*inputs), gate_gradient(*inputs))


def _rotary_error(kernel: Any, device: torch.device) -> str:
    cos, sin, *slopes = _made(device, (96, 64), (96, 64), (96, 6, 64), (96, 2, 64), (96, 2, 64))
    for chosen, rotated in ((slopes, 2), (slopes[:1], 1), (slopes[1:], 1)):
        inputs = chosen, cos, sin, rotated
        if error := _difference(kernel.rotary_gradient(*inputs), rotary_gradient(*inputs)):
            return error
    return ""


def _split_error(kernel: Any, device: torch.device) -> str:
    x, norm = _made(device, (96, 512), (256,))
    directions = principal_directions(x[:, :256])
    gate, up = (half.contiguous() for half in x.chunk(2, -1))
    for name, plain, source, weight in (
        ("as it is", gate, gate, None),
        ("normed", rms_norm(up, norm, 1e-5), up, norm),
        ("gated", F.silu(gate) * up, x, None),
    ):
        errors = []
        for values, scale in (kernel.split_rows(source, weight, 1e-5, directions, SLACK), split_rows(plain, directions)):
            rest, high, low, *_ = (values.float() * scale).split([256, *[DIRECTIONS] * 4], -1)
            errors.append((rest + (high + low) @ directions.float().t() - plain.float()).norm() / plain.norm())
        if not errors[0] <= 1.1 * errors[1] + 1e-3:
            return f"x {name} is off by {errors[0]:.2g}, {errors[1]:.2g} expected"
    return ""


#: By what of `split_kernel` they look at: in what it differs from the plain expression, empty where it does not.
_ERRORS: Final = {"split_rows": _split_error, "rotary_gradient": _rotary_error, "gate_gradient": _gate_error}


def check_fp8(form: type[Fp8Weight] | type[Fp8BackwardWeight], device: torch.device, compile_it: bool = False) -> None:
    """Raises ValueError, with the reason, where scaled float8 products do not run or pass back a wrong gradient."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    for what in _ERRORS:
        _kernel(device, what)  # to be chosen before anything is traced
    x, weight = (torch.randn(64, 64, generator=torch.Generator().manual_seed(n)).to(device, torch.bfloat16) for n in (0, 1))
    x.requires_grad_()
    linear = frozen.compiled(frozen_linear) if compile_it else frozen_linear
    try:
        y = linear(x, form.of(weight))
        (gradient,) = torch.autograd.grad(y, x, weight)
    except (RuntimeError, NotImplementedError) as error:
        raise ValueError(f"{name} does not run float8 products ({error}); use --frozen-precision dtype") from error
    for ours, exact in ((y, x @ weight.t()), (gradient, weight @ weight)):
        if not (ours - exact).norm() <= 0.06 * exact.norm():
            raise ValueError(
                f"float8 products are wrong on {name} with torch {torch.__version__}; use --frozen-precision dtype"
            )
