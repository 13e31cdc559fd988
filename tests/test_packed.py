"""The written-out frozen model against Transformers' own layers: losses, gradients, features, what is kept, 8 bits."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import IMAGE_ID, SPEC, random_example, tiny_a3
from transformers import LlamaConfig, LlamaForCausalLM

from artemis_vlm import RunError, frozen
from artemis_vlm.examples import Example
from artemis_vlm.frozen import use_packed_attention
from artemis_vlm.linear import (
    DIRECTIONS,
    PRECISIONS,
    Fp8BackwardWeight,
    Fp8Weight,
    check_fp8,
    frozen_linear,
    gated_mlp,
    normed_linear,
    principal_directions,
    quantize_rows,
    rms_norm,
    rotary_gradient,
    rotate,
    rotated_heads,
)
from artemis_vlm.modeling import ArtemisVLMForConditionalGeneration, packed_features, packed_loss
from artemis_vlm.packed import PackedModel
from artemis_vlm.packing import PackedBatch, pack

MAX_TOKENS = 64


def examples(seed: int = 0, count: int = 5) -> list[Example]:
    """One of them without an image."""
    rng = np.random.default_rng(seed)
    shapes = [((4, 6), 3, 5), ((2, 2), 6, 9), ((0, 0), 4, 4), ((8, 4), 2, 3), ((2, 14), 1, 1)]
    return [random_example(rng, f"u{i}", *shape) for i, shape in enumerate(shapes[:count])]


def packed_rows(chosen: list[Example], pad_to: int = 1) -> PackedBatch:
    return pack(chosen, image_token_id=IMAGE_ID, merge_size=2, pad_to=pad_to)


def batches() -> list[PackedBatch]:
    """Of several lengths."""
    return [packed_rows(examples(seed, count), 1 + 3 * seed) for seed, count in enumerate((5, 2, 4, 3))]


def trained(model: ArtemisVLMForConditionalGeneration) -> ArtemisVLMForConditionalGeneration:
    model.set_training_stage("stage1")
    return model


def loss_and_gradient(model: ArtemisVLMForConditionalGeneration, loss: torch.Tensor) -> tuple[float, torch.Tensor]:
    parameters = list(model.multi_modal_projector.parameters())
    gradients = torch.autograd.grad(loss, parameters) if loss.requires_grad else map(torch.zeros_like, parameters)
    return loss.item(), torch.cat([g.flatten() for g in gradients])


def plain(model: ArtemisVLMForConditionalGeneration, rows: PackedBatch) -> tuple[float, torch.Tensor]:
    """By Transformers' own layers; tests/test_model.py compares it with sample after sample."""
    use_packed_attention(model.visual, model.language_model)
    return loss_and_gradient(model, packed_loss(model, rows, SPEC))


def assert_equal(ours: tuple[float, torch.Tensor], theirs: tuple[float, torch.Tensor], tolerance: float = 1e-6) -> None:
    assert ours[0] == pytest.approx(theirs[0], rel=tolerance)
    assert (ours[1] - theirs[1]).norm() <= tolerance * theirs[1].norm()


@pytest.mark.parametrize("pad_to", [1, 64])
def test_written_out_equals_transformers_own_layers(pad_to: int) -> None:
    """In float64: in float32 either of them is as far from it as from the other."""
    model = trained(tiny_a3()).double()
    rows = packed_rows(examples(), pad_to)
    expected = plain(model, rows)
    packed = PackedModel(model, SPEC, MAX_TOKENS + pad_to)
    assert packed.layers
    assert_equal(loss_and_gradient(model, packed.loss(rows)), expected)
    assert_equal(plain(model, rows), expected)  # weights that share memory are still the decoder's


def test_packed_equals_one_by_one() -> None:
    model = trained(tiny_a3())
    packed = PackedModel(model, SPEC, MAX_TOKENS)
    together = loss_and_gradient(model, packed.loss(packed_rows(examples())))
    alone = [loss_and_gradient(model, packed.loss(packed_rows(one))) for one in ([e] for e in examples())]
    assert_equal(together, (sum(loss for loss, _ in alone), torch.stack([g for _, g in alone]).sum(0)))


def test_llama_is_known_and_others_run_as_they_are(caplog: pytest.LogCaptureFixture) -> None:
    sizes = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    for bias in (False, True):
        model = trained(tiny_a3())
        model.language_model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, attention_bias=bias)).requires_grad_(False)
        model.double()
        with caplog.at_level("WARNING"):
            packed = PackedModel(model, SPEC, MAX_TOKENS)
        assert bool(packed.layers) is not bias
        assert ("LlamaForCausalLM has layers that are not written out" in caplog.text) is bias
        ours = loss_and_gradient(model, packed.loss(packed_rows(examples())))
        assert_equal(ours, plain(model, packed_rows(examples())))
    with pytest.raises(RunError, match="fp8 is for Mistral's and Llama's layers"):
        PackedModel(model, SPEC, MAX_TOKENS, precision="fp8")


@pytest.mark.parametrize(
    ("decoder", "what", "sentence"),
    [
        (
            "mistral",
            {"sliding_window": 8},
            "packed rows of up to 64 tokens: its layers ask for attention with sliding_window",
        ),
        ("gemma2", {"sliding_window": 4096}, "ask for attention with softcap"),
        ("granite", {"logits_scaling": 8.0}, "differ by 7 of themselves from those of each sample alone"),
        ("gptj", {"n_embd": 64, "n_head": 4, "n_layer": 2, "rotary_dim": 8}, "its attention or its head does more"),
    ],
)
def test_what_packed_rows_would_change_is_refused(decoder: str, what: dict[str, Any], sentence: str) -> None:
    """Attention that is not plain, scaled logits, and layers that look beyond their sample."""
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(RunError, match=sentence):
            PackedModel(trained(tiny_a3(decoder=decoder, **what)).to(dtype), SPEC, MAX_TOKENS)


def test_tower_features_equal_transformers_to_rounding() -> None:
    """One frame with summed weights and whole images at once, beside both frames and Transformers' own forward."""
    rows = packed_rows(examples())
    for dtype, tolerance in ((torch.float64, 1e-6), (torch.float32, 2e-6), (torch.bfloat16, 2e-2)):
        model = trained(tiny_a3())
        model.visual.to(dtype)
        use_packed_attention(model.visual)
        theirs = packed_features(model, rows.patches, rows.grid_thw, SPEC)
        ours = PackedModel(model, SPEC, MAX_TOKENS).features(rows)
        assert ours.dtype == dtype
        assert (ours - theirs).norm() <= tolerance * theirs.norm()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # Dynamo looks at it, and hides this elsewhere
def test_compiled_equals_eager_and_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced and differentiated as on a GPU, then run as it is: the code that Inductor would write needs no test here."""
    monkeypatch.setattr(frozen, "compiled", functools.cache(functools.partial(torch.compile, backend="aot_eager")))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()  # what other tests compiled
    model = trained(tiny_a3(num_hidden_layers=3))
    eager, compiled = PackedModel(model, SPEC, MAX_TOKENS), PackedModel(model, SPEC, MAX_TOKENS, compile_it=True)
    graphs = []
    for rows in batches():
        expected = loss_and_gradient(model, eager.loss(rows))
        assert_equal(loss_and_gradient(model, compiled.loss(rows)), expected, 5e-6)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[-1] == 4, "tower block, decoder layer, last decoder layer, head: once each"


def test_samples_longer_than_prepared_for_are_refused() -> None:
    """A kernel that is told too small a length leaves rows unwritten."""
    model = trained(tiny_a3())
    with pytest.raises(RunError, match="a sample has 19 tokens; this model was prepared for 12"):
        PackedModel(model, SPEC, 12).loss(packed_rows(examples()))
    packed = PackedModel(model, SPEC, MAX_TOKENS)
    packed.tower.max_patches = 16
    with pytest.raises(RunError, match="an image has 32 patches; this tower was prepared for 16"):
        packed.loss(packed_rows(examples()))


# --- frozen linear layers --------------------------------------------------------------------------------------------


def kept_for_backward(call: Callable[[], torch.Tensor]) -> set[int]:
    """Where the memory begins that a call keeps for its backward pass."""
    kept: set[int] = set()

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        call()
    return kept


@pytest.mark.parametrize("precision", PRECISIONS)
def test_frozen_linears_keep_nothing_but_their_weight(precision: str) -> None:
    x, weight = torch.randn(32, 64, requires_grad=True), torch.randn(48, 64)
    kind = PRECISIONS[precision]
    form = weight if kind is None else kind.of(weight)
    ours = {t.untyped_storage().data_ptr() for t in (form if isinstance(form, tuple) else (form,))}
    assert kept_for_backward(lambda: frozen_linear(x, form)) <= ours


def test_attention_is_used_only_where_its_numbers_are_right() -> None:
    """The check that a GPU's kernels go through, with what a wrong one may do."""

    def attention(*tensors: torch.Tensor, causal: bool = True) -> torch.Tensor:
        q, k, v, cu_query, cu_key = tensors[:5]
        k, v = (t.repeat_interleave(2, 1) for t in (k, v))
        return frozen._attend_each(q, k, v, cu_query, cu_key, causal, None)

    def check(**wrong: bool) -> bool:
        return frozen._is_right(lambda *given: attention(*given[:5], **wrong), torch.device("cpu"), 32)

    assert check()
    assert not check(causal=False)
    assert not frozen._is_right(lambda *given: attention(*given[:5]).roll(1, 1), torch.device("cpu"), 32)
    assert frozen.choose_cudnn(torch.device("cpu"), 32) is False


def in_few_directions(rows: int, width: int, share: float = 0.3) -> torch.Tensor:
    """Rows that lie mostly in some directions."""
    return torch.randn(rows, 8) @ torch.randn(8, width) + share * torch.randn(rows, width)


@pytest.mark.parametrize("aimed", [False, True])
@pytest.mark.parametrize("spread", [1.0, 1e-6, 1e5])
def test_fp8_linears_are_within_the_stated_bound(spread: float, aimed: bool) -> None:
    torch.manual_seed(0)
    x = (in_few_directions(96, 128) * torch.logspace(-3, 2, 96)[:, None] * spread).requires_grad_()
    weight = torch.randn(64, 128) * torch.logspace(-2, 1, 64)[:, None]
    form = Fp8Weight.of(weight)
    if aimed:
        form.aim(weight, principal_directions(x.detach()))
    y = frozen_linear(x, form)
    slope = torch.randn_like(y)
    (gradient,) = torch.autograd.grad(y, x, slope)
    directions = form.directions.double()
    along = x.detach().double() @ directions
    rest = x.detach().double() - along @ directions.t()
    share = 1 / 8 + 1 / 128  # two roundings to float8 and their product; one of the result to bfloat16
    for ours, left, right, exact in (
        (y, rest, weight.double(), x.detach().double() @ weight.double().t()),
        (gradient, slope.double(), weight.t().double(), slope.double() @ weight.double()),
    ):
        # A row's scale is at most its length, or that of what it is made of, over 443.
        whole = x.detach().double() if ours is y else left
        left_step, right_step = (m.norm(dim=-1, keepdim=True) / 443 / 1024 for m in (whole, right))
        bound = share * left.abs() @ right.abs().t() + exact.abs() / 256
        bound += left_step * right.abs().sum(-1) + left.abs().sum(-1, keepdim=True) * right_step.t()
        if ours is y:
            bound += along.abs() @ (right @ directions).abs().t() / 64
            bound += left_step * (right @ directions).abs().sum(-1) + along.abs().sum(-1, keepdim=True) * right_step.t()
        assert ((ours.double() - exact).abs() <= bound).all()
        assert (ours.double() - exact).norm() <= (0.012 if aimed and ours is y else 0.06) * exact.norm()


def test_principal_directions_hold_what_lies_in_few() -> None:
    torch.manual_seed(0)
    x = in_few_directions(200, 96, share=0.01)
    found = principal_directions(x).float()
    assert torch.allclose(found.t() @ found, torch.eye(DIRECTIONS), atol=0.01)
    assert (x - x @ found @ found.t()).norm() < 0.01 * x.norm()
    assert torch.equal(principal_directions(x), found.bfloat16()), "the same each time"
    narrow = principal_directions(x[:, :20])
    assert narrow.shape == (20, DIRECTIONS)
    assert not narrow[:, 20:].any()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_fused_layers_are_what_they_say(precision: str) -> None:
    torch.manual_seed(0)
    kind, norm = PRECISIONS[precision], torch.rand(32)
    first, second = (w if kind is None else kind.of(w) for w in (torch.randn(96, 32), torch.randn(32, 48)))
    x = torch.randn(16, 32, requires_grad=True)
    slope = torch.randn(16, 32)
    fused, normed = normed_linear(x, norm, 1e-5, first), rms_norm(x, norm, 1e-5)
    plain = frozen_linear(normed, first)
    assert torch.equal(fused, plain)
    inner = F.silu(plain[:, :48]) * plain[:, 48:]
    outputs = gated_mlp(x, norm, 1e-5, first, second), frozen_linear(inner, second)
    assert torch.equal(*outputs)
    ours, theirs = (torch.autograd.grad(y, x, slope, retain_graph=True)[0] for y in outputs)
    # The gate's gradient is float32 until it is rounded to 8 bits: now and then to the other neighbour.
    assert (ours - theirs).norm() <= 1e-3 * theirs.norm()


@pytest.mark.parametrize(("numbers", "rotated"), [((4, 2, 2), 2), ((4,), 1), ((2, 2), 1)])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_rotated_heads_are_what_they_say(precision: str, numbers: tuple[int, ...], rotated: int) -> None:
    torch.manual_seed(0)
    kind, norm, weight = PRECISIONS[precision], torch.rand(32), torch.randn(sum(numbers) * 16, 32)
    form = weight if kind is None else kind.of(weight)
    angles = torch.rand(24, 8).repeat(1, 2) * 6
    x, cos, sin = torch.randn(24, 32, requires_grad=True), angles.cos(), angles.sin()
    whole = normed_linear(x, norm, 1e-5, form)
    ours = rotated_heads(x, norm, 1e-5, form, cos, sin, numbers, rotated)
    parts = torch.split(whole.view(24, -1, 16), numbers, 1)
    theirs = [rotate(part, cos, sin) if i < rotated else part for i, part in enumerate(parts)]
    assert all(torch.equal(*pair) for pair in zip(ours, theirs))
    slopes = [torch.randn_like(part) for part in parts]
    gradients = [torch.autograd.grad(heads, x, slopes, retain_graph=True)[0] for heads in (ours, theirs)]
    assert (gradients[0] - gradients[1]).norm() <= 1e-3 * gradients[1].norm()
    (plain,) = torch.autograd.grad(theirs, whole, slopes)
    rounded, scales = rotary_gradient(slopes, cos, sin, rotated)
    assert ((rounded.float() * scales - plain).abs() <= 1.001 * plain.abs() / 16 + scales / 1024).all()


FORMS = Fp8Weight, Fp8BackwardWeight


@pytest.mark.parametrize("kind", FORMS)
def test_compiled_fp8_layers_pass_back_the_same_gradient(kind: type[Fp8Weight] | type[Fp8BackwardWeight]) -> None:
    """Compiled once for all lengths: one that the layer fixed, as `len` does, would be an error."""
    torch.manual_seed(0)
    norm, wide, narrow = torch.rand(64), kind.of(torch.randn(96, 64)), kind.of(torch.randn(64, 48))
    layers: list[Callable[[torch.Tensor], torch.Tensor]] = [
        lambda x: torch.cat(tuple(rotated_heads(x, norm, 1e-5, wide, x[:, :16], x[:, 16:32], (3, 2, 1), 2)), 1),
        lambda x: frozen_linear(x, wide),
        lambda x: normed_linear(x, norm, 1e-5, wide),
        lambda x: gated_mlp(x, norm, 1e-5, wide, narrow),
    ]
    for layer in layers:
        compiled = torch.compile(layer, backend="aot_eager")
        for rows in (32, 48):
            x = torch.randn(rows, 64, requires_grad=True)
            frozen.mark_rows(x)
            outputs = [way(x) for way in (layer, compiled)]
            slope = torch.randn_like(outputs[0])
            gradients = [torch.autograd.grad(y, x, slope)[0] for y in outputs]
            assert gradients[0].norm() > 0
            assert torch.allclose(*outputs, rtol=1e-6)
            assert torch.allclose(*gradients, rtol=1e-6)
    check_fp8(kind, torch.device("cpu"))


def test_fp8_backward_linears_are_exact_forward_and_fp8_backward() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(32, 64, requires_grad=True), torch.randn(48, 64)
    plain, fp8, ours = (frozen_linear(x, w) for w in (weight, Fp8Weight.of(weight), Fp8BackwardWeight.of(weight)))
    assert torch.equal(ours, plain)
    slope = torch.randn_like(plain)
    gradients = [torch.autograd.grad(y, x, slope)[0] for y in (fp8, ours)]
    assert torch.equal(*gradients)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_fp8_passes_on_what_is_not_finite(bad: float) -> None:
    x = torch.randn(16, 32)
    x[3, 5] = bad
    y = frozen_linear(x, Fp8Weight.of(torch.randn(16, 32)))
    assert y[3].isnan().all()
    assert y[torch.arange(16) != 3].isfinite().all()
    assert quantize_rows(torch.zeros(2, 4))[0].float().eq(0).all()


@pytest.mark.parametrize("precision", ["fp8", "fp8-backward"])
def test_fp8_training_is_near_and_leaves_the_model_alone(precision: str) -> None:
    model = trained(tiny_a3()).to(torch.bfloat16)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    rows = packed_rows(examples())
    expected = loss_and_gradient(model, PackedModel(model, SPEC, MAX_TOKENS).loss(rows))
    packed = PackedModel(model, SPEC, MAX_TOKENS, precision=precision)
    ours = loss_and_gradient(model, packed.loss(rows))
    assert ours[0] == pytest.approx(expected[0], rel=0.03)
    assert F.cosine_similarity(ours[1].float(), expected[1].float(), 0) > 0.97
    assert (ours[0] == expected[0]) == (precision == "fp8-backward")
    assert not torch.equal(ours[1], expected[1])
    with packed.exact(), torch.no_grad():
        assert packed.loss(rows) == expected[0]
    assert packed.loss(rows).item() == pytest.approx(ours[0])
    with packed.original_weights():
        after = model.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())
