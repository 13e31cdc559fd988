"""What makes training through frozen weights fast, beside `linear`.

Attention over packed samples, and a cross entropy over a frozen head that never holds all logits. Each replaces a plain
expression that its docstring states and the tests compare with.

Shape suffixes: T tokens, H hidden size, S supervised tokens, V vocabulary, N heads, D head size.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

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
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
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

    Raises:
        ValueError: an attention with soft capping, sinks, or a window that is smaller than max_length_q.
    """
    narrow = sliding_window is not None and (max_length_q is None or sliding_window < max_length_q)
    asked = {"softcap": softcap is not None, "s_aux": s_aux is not None, "sliding_window": narrow}
    if any(asked.values()):
        names = ", ".join(name for name, is_asked in asked.items() if is_asked)
        raise ValueError(
            f"its layers ask for attention with {names}; {PACKED_ATTENTION} is plain, over {max_length_q} tokens"
        )
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
    own token, a sample's last query being its last token. On CUDA one variable-length kernel: cuDNN's for causal attention
    where `choose_cudnn` found it, else torch's. Elsewhere one SDPA call a sample, which computes no masked block, or in
    compiled code, which must not wait for lengths, one with that mask.

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
        varlen = _cudnn_varlen if causal and _cudnn is not None else _varlen
        return varlen(query, key, value, cu_query, cu_key, max_length, causal, scale)
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
            if _is_right(_varlen, device, 64):
                break
            logger.info("the variable-length kernel gives other numbers with grouped heads %s", _VARLEN)
        except (RuntimeError, ValueError, NotImplementedError) as error:
            logger.info("the variable-length kernel refuses grouped heads %s: %s", _VARLEN, error)
    else:
        _VARLEN = "absent"
    logger.info("variable-length attention on %s: grouped heads %s", torch.cuda.get_device_name(device), _VARLEN)
    return _VARLEN


#: The module `cudnn_attention`, where `choose_cudnn` found that it can be used. For causal attention alone: a decoder's is
#: made faster by it, a tower's hardly, and each call costs 0.4 ms of the processor, which one image would wait for.
_cudnn: Any = None


def choose_cudnn(device: torch.device, head_size: int) -> bool:
    """Settles whether `attend` uses cuDNN's kernels for causal attention on a GPU: where they give the right numbers."""
    global _cudnn
    _cudnn = None
    if device.type != "cuda" or _VARLEN == "absent":
        return False
    try:
        from artemis_vlm import cudnn_attention as _cudnn

        found = "" if _is_right(_cudnn_varlen, device, head_size) else "they give other numbers"
    except (ImportError, OSError) as error:
        found = f"{error}; pip install 'artemis-vlm[gpu]' brings them"
    except Exception as error:  # cuDNN has exceptions of its own for what it cannot do on a device
        found = f"{type(error).__name__}: {error}"
    if found:
        _cudnn = None
        logger.info("causal attention in torch's kernel, not in cuDNN's: %s", found)
    else:
        logger.info("causal attention in cuDNN's kernels on %s", torch.cuda.get_device_name(device))
    return not found


def _cudnn_varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_query: torch.Tensor,
    cu_key: torch.Tensor,
    max_length: int,
    causal: bool,
    scale: float | None,
) -> torch.Tensor:
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    made: Any = _cudnn.attention(query, key, value, cu_query, cu_key, max_length, cu_query is not cu_key, causal, scale)
    return made[0]  # type: ignore[no-any-return]


def _is_right(varlen: Callable[..., torch.Tensor], device: torch.device, size: int) -> bool:
    """Whether output and gradients with 2 key heads for 4 query heads, of all queries or the last, are those of SDPA."""
    made = torch.Generator(device).manual_seed(0)
    samples, tails = (torch.tensor(ends, dtype=torch.int32, device=device) for ends in ((0, 40, 96), (0, 24, 80)))
    query, *rest = (torch.randn(96, n, size, device=device, generator=made).bfloat16() for n in (4, 2, 2))

    def results(
        attention: Callable[..., torch.Tensor], ends: torch.Tensor, *last: Any, dtype: torch.dtype
    ) -> list[torch.Tensor]:
        leaves = [value.to(dtype, copy=True).requires_grad_() for value in (query[: int(ends[-1])], *rest)]
        out = attention(*leaves, ends, samples, *last)
        return [out.detach(), *torch.autograd.grad(out.float().square().sum(), leaves)]

    def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *ends: torch.Tensor) -> torch.Tensor:
        k, v = (t.repeat_interleave(2, 1) for t in (k, v))
        return _attend_each(q, k, v, ends[0], ends[1], True, None)

    return all(
        bool((ours.float() - theirs).norm() <= 0.02 * theirs.norm())
        for ends in (samples, tails)
        for ours, theirs in zip(
            results(varlen, ends, 64, True, None, dtype=torch.bfloat16), results(plain, ends, dtype=torch.float32)
        )
    )


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
