"""`linear.split_rows` for GPUs with Triton, which reads what x is made of: a norm's result is never written.

Three kernels: what of x lies along the directions, by parts of its columns; their sum and the scale; the rest. Imported
only where Triton is.
"""

import torch
import triton  # type: ignore[import-not-found,unused-ignore]
import triton.language as tl  # type: ignore[import-not-found,unused-ignore]
from torch.library import triton_op, wrap_triton

#: Columns that one program of the first kernel sums over.
SPAN = 1024
#: Rows of a block in the first and the last kernel, and in the other; columns; fastest of 355 ways on an H100.
ROWS, SUM_ROWS = 64, 8
COLUMNS = {"plain": 128, "normed": 32, "gated": 64}
REST_COLUMNS = 64


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _load(x_ptr, rows, columns, n_rows, K: tl.constexpr, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    """A block of x in float32, before a norm."""
    mask = (rows < n_rows)[:, None] & (columns < K)[None, :]
    if KIND == "gated":
        at = x_ptr + rows.to(tl.int64)[:, None] * (2 * K) + columns[None, :]
        gate = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        x = gate / (1 + tl.exp(-gate)) * tl.load(at + K, mask=mask, other=0.0).to(tl.float32)
    else:
        x = tl.load(x_ptr + rows.to(tl.int64)[:, None] * K + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    return x


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _along(  # type: ignore[no-untyped-def]
    x_ptr,
    norm_ptr,
    directions_ptr,
    sums_ptr,
    squares_ptr,
    n_rows,
    K: tl.constexpr,
    R: tl.constexpr,
    KIND: tl.constexpr,
    SPAN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Of SPAN columns: x @ directions, (part, T, R); the sums of squares of x, and before a norm, (part, 2, T)."""
    rows, n = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, R)
    part = tl.program_id(1)
    along = tl.zeros((ROWS, R), tl.float32)
    squares = tl.zeros((ROWS, COLUMNS), tl.float32)
    before = tl.zeros((ROWS, COLUMNS), tl.float32)
    for begin in range(0, SPAN, COLUMNS):
        columns = part * SPAN + begin + tl.arange(0, COLUMNS)
        x = _load(x_ptr, rows, columns, n_rows, K, KIND)
        if KIND == "normed":
            before += x * x
            x *= tl.load(norm_ptr + columns, mask=columns < K, other=0.0).to(tl.float32)[None, :]
        squares += x * x
        at = directions_ptr + columns[:, None] * R + n[None, :]
        directions = tl.load(at, mask=(columns < K)[:, None], other=0.0)
        along = tl.dot(x.to(directions.dtype), directions, along)
    present = rows < n_rows
    tl.store(sums_ptr + (part * n_rows + rows)[:, None] * R + n[None, :], along, mask=present[:, None])
    tl.store(squares_ptr + part * 2 * n_rows + rows, tl.sum(squares, 1), mask=present)
    if KIND == "normed":
        tl.store(squares_ptr + (part * 2 + 1) * n_rows + rows, tl.sum(before, 1), mask=present)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _sum(  # type: ignore[no-untyped-def]
    sums_ptr,
    squares_ptr,
    along_ptr,
    factor_ptr,
    scale_ptr,
    split_ptr,
    n_rows,
    EPSILON: tl.constexpr,
    SLACK: tl.constexpr,
    PARTS: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The parts' sum in the directions' dtype, the norm's factor, the scale, and the two halves in 8 bits."""
    rows, n = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, R)
    inside = rows < n_rows
    along = tl.zeros((ROWS, R), tl.float32)
    squares = tl.zeros((ROWS,), tl.float32)
    before = tl.zeros((ROWS,), tl.float32)
    for part in range(PARTS):
        along += tl.load(sums_ptr + (part * n_rows + rows)[:, None] * R + n[None, :], mask=inside[:, None], other=0.0)
        squares += tl.load(squares_ptr + part * 2 * n_rows + rows, mask=inside, other=0.0)
        if KIND == "normed":
            before += tl.load(squares_ptr + (part * 2 + 1) * n_rows + rows, mask=inside, other=0.0)
    length = tl.sqrt(squares)
    if KIND == "normed":
        factor = 1 / tl.sqrt(before / K + EPSILON)
        tl.store(factor_ptr + rows, factor, mask=inside)
        along *= factor[:, None]
        length *= factor
    rounded = along.to(along_ptr.dtype.element_ty)
    tl.store(along_ptr + rows[:, None] * R + n[None, :], rounded, mask=inside[:, None])
    scale = length * SLACK
    scale = tl.where(scale < 1e-12, 1e-12, scale)  # not tl.maximum, which drops a NaN
    tl.store(scale_ptr + rows, scale, mask=inside)
    halves = rounded.to(tl.float32) / scale[:, None]
    # Rounded to 4 bits by hand: Triton 3.6 takes wrong bits where a float8 goes back to float32 here.
    high = ((halves.to(tl.int32, bitcast=True) + 0x80000) & -0x100000).to(tl.float32, bitcast=True)
    low = (halves - high).to(tl.float8e4nv)
    out = split_ptr + rows.to(tl.int64)[:, None] * (K + 4 * R) + K + n[None, :]
    high = high.to(tl.float8e4nv)
    tl.store(out, high, mask=inside[:, None])
    tl.store(out + R, low, mask=inside[:, None])
    tl.store(out + 2 * R, high, mask=inside[:, None])
    tl.store(out + 3 * R, low, mask=inside[:, None])


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _rest(  # type: ignore[no-untyped-def]
    x_ptr,
    norm_ptr,
    directions_ptr,
    along_ptr,
    factor_ptr,
    scale_ptr,
    split_ptr,
    n_rows,
    K: tl.constexpr,
    R: tl.constexpr,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """What is left of x, in 8 bits."""
    rows, n = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, R)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = rows < n_rows
    x = _load(x_ptr, rows, columns, n_rows, K, KIND)
    if KIND == "normed":
        x *= tl.load(norm_ptr + columns, mask=columns < K, other=0.0).to(tl.float32)[None, :]
        x *= tl.load(factor_ptr + rows, mask=inside, other=0.0)[:, None]
    along = tl.load(along_ptr + rows[:, None] * R + n[None, :], mask=inside[:, None], other=0.0)
    directions = tl.load(directions_ptr + columns[None, :] * R + n[:, None], mask=(columns < K)[None, :], other=0.0)
    scale = tl.load(scale_ptr + rows, mask=inside, other=1.0)
    rest = (x - tl.dot(along, directions)) / scale[:, None]
    out = split_ptr + rows.to(tl.int64)[:, None] * (K + 4 * R) + columns[None, :]
    tl.store(out, rest.to(tl.float8e4nv), mask=inside[:, None] & (columns < K)[None, :])


@triton_op("artemis_vlm::split_rows", mutates_args=())  # type: ignore[untyped-decorator,unused-ignore]
def split_rows(
    source: torch.Tensor, norm: torch.Tensor | None, epsilon: float, directions: torch.Tensor, slack: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`linear.split_rows` of x (T, K), which is `source`; or, with norm (K,), what `rms_norm` makes of source; or, where
    source is (T, 2 K), silu of its first half times its second.

    Args:
        source: bfloat16, contiguous; directions: bfloat16 (K, R), contiguous.
        slack: scale over the length of a row.
    """
    n_rows, (width, count) = source.shape[0], directions.shape  # len() would fix a dynamic one
    kind = "normed" if norm is not None else "gated" if source.shape[1] == 2 * width else "plain"
    parts = -(-width // SPAN)
    weight = directions if norm is None else norm
    split = source.new_empty((n_rows, width + 4 * count), dtype=torch.float8_e4m3fn)
    along = directions.new_empty((n_rows, count))
    scales, factors = (source.new_empty((n_rows, 1), dtype=torch.float32) for _ in range(2))
    sums = source.new_empty((parts, n_rows, count), dtype=torch.float32)
    squares = source.new_empty((parts, 2, n_rows), dtype=torch.float32)
    inputs, blocks = (source, weight, directions), -(-n_rows // ROWS)
    shape = {"K": width, "R": count, "KIND": kind}
    wrap_triton(_along)[(blocks, parts)](
        *inputs, sums, squares, n_rows, **shape, SPAN=SPAN, ROWS=ROWS, COLUMNS=COLUMNS[kind], num_warps=4, num_stages=4
    )
    # Epsilon and slack are no arguments, as compiled code would pass float64.
    fixed = {"EPSILON": epsilon, "SLACK": slack, "PARTS": parts, "ROWS": SUM_ROWS}
    wrap_triton(_sum)[(-(-n_rows // SUM_ROWS),)](sums, squares, along, factors, scales, split, n_rows, **fixed, **shape)
    wrap_triton(_rest)[(blocks, -(-width // REST_COLUMNS))](
        *inputs, along, factors, scales, split, n_rows, **shape, ROWS=ROWS, COLUMNS=REST_COLUMNS, num_warps=4
    )
    return split, scales


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _gate_gradient(  # type: ignore[no-untyped-def]
    slope_ptr, gate_up_ptr, out_ptr, scale_ptr, F: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < F
    slope = tl.load(slope_ptr + row * F + columns, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_up_ptr + row * 2 * F + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * 2 * F + F + columns, mask=inside, other=0.0).to(tl.float32)
    share = 1 / (1 + tl.exp(-gate))
    slope *= share
    d_up = slope * gate
    d_gate = slope * up * (1 + gate * (1 - share))
    top = tl.max(tl.maximum(tl.abs(d_up), tl.abs(d_gate)), 0)
    top = tl.where(top < 1e-12, 1e-12, top) + tl.sum(d_up + d_gate, 0) * 0  # a maximum drops a NaN, a sum does not
    scale = top / 448.0
    tl.store(scale_ptr + row, scale)
    tl.store(out_ptr + row * 2 * F + columns, (d_gate / scale).to(tl.float8e4nv), mask=inside)
    tl.store(out_ptr + row * 2 * F + F + columns, (d_up / scale).to(tl.float8e4nv), mask=inside)


@triton_op("artemis_vlm::gate_gradient", mutates_args=())  # type: ignore[untyped-decorator,unused-ignore]
def gate_gradient(slope: torch.Tensor, gate_up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`linear.gate_gradient`, a row to a program. Args: both contiguous."""
    n_rows, width = slope.shape[0], slope.shape[1]
    out = gate_up.new_empty((n_rows, 2 * width), dtype=torch.float8_e4m3fn)
    scales = gate_up.new_empty((n_rows, 1), dtype=torch.float32)
    block = 1 << (width - 1).bit_length()
    wrap_triton(_gate_gradient)[(n_rows,)](
        slope, gate_up, out, scales, F=width, BLOCK=block, num_warps=32 if block >= 8192 else 4
    )
    return out, scales


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _turned_back(  # type: ignore[no-untyped-def]
    slope_ptr,
    cos_ptr,
    sin_ptr,
    N: tl.constexpr,
    D: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROTATED: tl.constexpr,
):
    """A row's gradient of N heads as they were before `rotate`, float32 (HEADS, WIDTH)."""
    row, n, d = tl.program_id(0).to(tl.int64), tl.arange(0, HEADS)[:, None], tl.arange(0, WIDTH)[None, :]
    inside = (n < N) & (d < D)
    at = slope_ptr + (row * N + n) * D
    slope = tl.load(at + d, mask=inside, other=0.0).to(tl.float32)
    if ROTATED:
        partner = tl.where(d < D // 2, d + D // 2, d - D // 2)
        across = tl.load(at + partner, mask=inside, other=0.0).to(tl.float32)
        across *= tl.load(sin_ptr + row * D + partner, mask=d < D, other=0.0).to(tl.float32)
        slope *= tl.load(cos_ptr + row * D + d, mask=d < D, other=0.0).to(tl.float32)
        slope += tl.where(d < D // 2, across, -across)
    return slope


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _put(  # type: ignore[no-untyped-def]
    out_ptr, slope, scale, N: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr
):
    n, d = tl.arange(0, HEADS)[:, None], tl.arange(0, WIDTH)[None, :]
    tl.store(out_ptr + n * D + d, (slope / scale).to(tl.float8e4nv), mask=(n < N) & (d < D))


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _rotary_gradient(  # type: ignore[no-untyped-def]
    a_ptr,
    b_ptr,
    c_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    scale_ptr,
    A: tl.constexpr,
    B: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
    A_HEADS: tl.constexpr,
    B_HEADS: tl.constexpr,
    C_HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROTATED: tl.constexpr,
):
    """Of A, B and C heads, the last ones 0 where there are fewer parts."""
    row = tl.program_id(0).to(tl.int64)
    a = _turned_back(a_ptr, cos_ptr, sin_ptr, A, D, A_HEADS, WIDTH, ROTATED > 0)
    top, total = tl.max(tl.abs(a)), tl.sum(a)
    if B > 0:
        b = _turned_back(b_ptr, cos_ptr, sin_ptr, B, D, B_HEADS, WIDTH, ROTATED > 1)
        top, total = tl.maximum(top, tl.max(tl.abs(b))), total + tl.sum(b)
    if C > 0:
        c = _turned_back(c_ptr, cos_ptr, sin_ptr, C, D, C_HEADS, WIDTH, ROTATED > 2)
        top, total = tl.maximum(top, tl.max(tl.abs(c))), total + tl.sum(c)
    scale = (tl.where(top < 1e-12, 1e-12, top) + total * 0) / 448.0  # a maximum drops a NaN, a sum does not
    tl.store(scale_ptr + row, scale)
    out_ptr += row * (A + B + C) * D
    _put(out_ptr, a, scale, A, D, A_HEADS, WIDTH)
    if B > 0:
        _put(out_ptr + A * D, b, scale, B, D, B_HEADS, WIDTH)
    if C > 0:
        _put(out_ptr + (A + B) * D, c, scale, C, D, C_HEADS, WIDTH)


@triton_op("artemis_vlm::rotary_gradient", mutates_args=())  # type: ignore[untyped-decorator,unused-ignore]
def rotary_gradient(
    slopes: list[torch.Tensor], cos: torch.Tensor, sin: torch.Tensor, rotated: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`linear.rotary_gradient` of at most three parts, a row to a program."""
    (n_rows, size), numbers = cos.shape, [slope.shape[1] for slope in slopes]
    out = cos.new_empty((n_rows, sum(numbers) * size), dtype=torch.float8_e4m3fn)
    scales = cos.new_empty((n_rows, 1), dtype=torch.float32)
    absent = 3 - len(slopes)
    counts = [*numbers, *[0] * absent]
    names = dict(zip("ABC", counts)) | {f"{name}_HEADS": triton.next_power_of_2(max(n, 1)) for name, n in zip("ABC", counts)}
    inputs = [t.contiguous() for t in (*slopes, *[slopes[0]] * absent, cos, sin)]
    wrap_triton(_rotary_gradient)[(n_rows,)](
        *inputs, out, scales, D=size, WIDTH=triton.next_power_of_2(size), ROTATED=rotated, **names, num_warps=8
    )
    return out, scales
