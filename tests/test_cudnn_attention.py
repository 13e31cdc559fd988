"""What `cudnn_attention` tells cuDNN, with a stand-in for it: cuDNN runs on GPUs alone, and CI has none.

The stand-in computes in plain PyTorch what a plan says, from the memory it is given and where the plan looks there. On
a GPU `frozen.choose_cudnn` makes the same comparison with cuDNN itself at each start.
"""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from artemis_vlm import frozen

CPU = torch.device("cpu")


class Described:
    """A plan's tensor: where it is said to lie."""

    def __init__(self, uid: int = 0, dim: list[int] | None = None, stride: list[int] | None = None, **_: Any) -> None:
        self.uid, self.dim, self.stride = uid, dim or [], stride or []
        self.ragged: Described | None = None

    def __getattr__(self, name: str) -> Any:
        def put(value: Any) -> Described:
            setattr(self, {"ragged_offset": "ragged"}.get(name[4:], name[4:]), value)
            return self

        if not name.startswith("set_"):
            raise AttributeError(name)
        return put


class Graph:
    """Runs attention on each sample of a plan by itself, in float32."""

    def __init__(self, **_: Any) -> None:
        self.options: dict[str, Any] = {}
        self.made: tuple[Described, ...] = ()

    def tensor(self, **described: Any) -> Described:
        return Described(**described)

    def sdpa(self, name: str, **options: Any) -> tuple[Described, ...]:
        self.options, self.made = options, (Described(), Described())
        return self.made

    def sdpa_backward(self, name: str, **options: Any) -> tuple[Described, ...]:
        self.options, self.made = options, (Described(), Described(), Described())
        return self.made

    def validate(self) -> None: ...
    def build_operation_graph(self) -> None: ...
    def create_execution_plans(self, modes: list[str]) -> None: ...
    def check_support(self) -> None: ...
    def build_plans(self) -> None: ...

    def get_workspace_size(self) -> int:
        return 0

    def execute(self, given: dict[int, torch.Tensor], workspace: torch.Tensor, handle: int) -> None:
        self.given = given
        lengths = [given[self.options[name].uid] for name in ("seq_len_q", "seq_len_kv")]
        room = self.options["q"].dim[0]
        assert room % 4 == 0
        assert all(rows.data_ptr() % 16 == 0 for rows in lengths)
        for sample, (n_query, n_key) in enumerate(zip(*(rows[:room].tolist() for rows in lengths))):
            assert max(n_query, n_key) <= self.options["q"].dim[2]
            self.attend(sample, n_query, n_key)

    def rows(self, described: Described, sample: int, count: int) -> torch.Tensor:
        """(count, N, D), where the plan says they are."""
        base = self.given[described.uid]
        assert base.data_ptr() % 16 == 0
        if described.ragged is None:  # the sums, which are not packed: (count, N)
            return base[sample, :, :count, 0].t()
        places = self.given[described.ragged.uid]
        assert places.data_ptr() % 16 == 0
        assert described.dim[0] == described.ragged.dim[0] - 1
        _, head, token, _ = described.stride
        size = (count, described.dim[1], described.dim[3])
        return torch.as_strided(base, size, (token, head, 1), base.storage_offset() + int(places[sample]))

    def attend(self, sample: int, n_query: int, n_key: int) -> None:
        options, groups = self.options, self.options["q"].dim[1] // self.options["k"].dim[1]
        q = self.rows(options["q"], sample, n_query).float().transpose(0, 1)
        k, v = (
            self.rows(options[name], sample, n_key).float().transpose(0, 1).repeat_interleave(groups, 0) for name in "kv"
        )
        scores = q @ k.transpose(1, 2) * options["attn_scale"]
        if "diagonal_band_right_bound" in options:
            after = n_key - n_query if options["diagonal_alignment"] == "bottom right" else 0
            scores.masked_fill_(torch.ones(n_query, n_key).triu(after + 1).bool(), -torch.inf)
        if "dO" not in options:
            sums = scores.logsumexp(-1)
            made = torch.softmax(scores, -1) @ v, sums[:, :, None]
        else:
            slope, out = (self.rows(options[name], sample, n_query).float().transpose(0, 1) for name in ("dO", "o"))
            share = torch.exp(scores - self.rows(options["stats"], sample, n_query).t()[:, :, None])
            d_scores = share * (slope @ v.transpose(1, 2) - (slope * out).sum(-1, keepdim=True)) * options["attn_scale"]
            d_key, d_value = (
                t.unflatten(0, (-1, groups)).sum(1) for t in (d_scores.transpose(1, 2) @ q, share.transpose(1, 2) @ slope)
            )
            made = d_scores @ k, d_key, d_value
        for described, values in zip(self.made, made):
            rows = values.transpose(0, 1)
            self.rows(described, sample, len(rows)).copy_(rows if described.ragged else rows[:, :, 0])


@pytest.fixture(scope="module")
def cudnn_attention() -> Any:
    """The module, with the stand-in: its operators can be registered once a process."""
    cudnn: Any = ModuleType("cudnn")
    cudnn.pygraph = Graph
    cudnn.data_type = SimpleNamespace(**{n: n for n in ("BFLOAT16", "HALF", "FLOAT", "INT32", "INT64")})
    cudnn.diagonal_alignment = SimpleNamespace(TOP_LEFT="top left", BOTTOM_RIGHT="bottom right")
    cudnn.heur_mode = SimpleNamespace(A="A", FALLBACK="FALLBACK")
    before = sys.modules.get("cudnn")
    sys.modules["cudnn"] = cudnn
    try:
        from artemis_vlm import cudnn_attention
    finally:
        if before is None:
            del sys.modules["cudnn"]
        else:
            sys.modules["cudnn"] = before
    return cudnn_attention


@pytest.fixture
def attend(cudnn_attention: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`frozen._cudnn_varlen`."""
    monkeypatch.setattr(cudnn_attention, "_handle", lambda device: 0)
    monkeypatch.setattr(frozen, "_cudnn", cudnn_attention)
    return frozen._cudnn_varlen


def test_the_check_at_the_start_passes_it(attend: Any) -> None:
    assert frozen._is_right(attend, CPU, 32)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", [[7], [5, 1, 3, 2, 9], [3] * 8])
def test_compiled_it_equals_one_sample_after_the_other(attend: Any, lengths: list[int], causal: bool) -> None:
    """Key and value as slices of a wider tensor, more room than samples, and dynamic lengths."""
    torch.manual_seed(0)
    ends = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    wide = torch.randn(int(ends[-1]), 10, 16).bfloat16()
    slope = torch.randn(int(ends[-1]), 6, 16).bfloat16()

    def ours(x: torch.Tensor, cu: torch.Tensor) -> torch.Tensor:
        query, key, value = x.split([6, 2, 2], 1)
        return attend(2 * query, key, value, cu, cu, 16, causal, None)

    def plain(x: torch.Tensor, cu: torch.Tensor) -> torch.Tensor:
        query, key, value = x.split([6, 2, 2], 1)
        key, value = (t.repeat_interleave(3, 1) for t in (key, value))
        return frozen._attend_each(2 * query, key, value, cu, cu, causal, None)

    def results(way: Any, x: torch.Tensor) -> list[torch.Tensor]:
        x = x.clone().requires_grad_()
        frozen.mark_rows(x, ends)
        out = way(x, ends)
        return [out.detach(), torch.autograd.grad(out, x, slope.to(x.dtype))[0]]

    exact = results(plain, wide.float())
    for way in (ours, torch.compile(ours, backend="aot_eager")):
        for values, expected in zip(results(way, wide), exact):
            assert (values.float() - expected).norm() <= 0.01 * expected.norm()


def test_few_plans_serve_all_batches(cudnn_attention: Any, attend: Any) -> None:
    cudnn_attention._forward_plan.cache_clear()
    cudnn_attention._backward_plan.cache_clear()
    for count in range(5, 9):
        ends = torch.arange(count + 1, dtype=torch.int32) * 3
        q, k, v = (torch.randn(3 * count, n, 16).bfloat16().requires_grad_() for n in (4, 2, 2))
        attend(q, k, v, ends, ends, 16, True, None).sum().backward()
    assert cudnn_attention._forward_plan.cache_info().misses == 1
    assert cudnn_attention._backward_plan.cache_info().misses == 1
