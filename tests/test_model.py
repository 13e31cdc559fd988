"""Model, packing and loss: every fast path against the plain one, in float32."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import IMAGE_ID, SPEC, model_inputs, random_example, tiny_a3, tiny_config

from artemis_vlm import ArtemisVLMConfig, ArtemisVLMForConditionalGeneration, SampleError
from artemis_vlm.examples import split_by_tokens
from artemis_vlm.frozen import frozen_head_cross_entropy, unpacked_attention, use_packed_attention
from artemis_vlm.modeling import normalize, packed_loss
from artemis_vlm.packing import pack


def examples(seed: int = 0) -> list:
    rng = np.random.default_rng(seed)
    shapes = [((4, 6), 3, 5), ((2, 2), 6, 9), ((0, 0), 4, 4), ((8, 4), 2, 3), ((2, 14), 1, 1)]
    return [random_example(rng, f"u{i}", *shape) for i, shape in enumerate(shapes)]


def projector_gradients(model: ArtemisVLMForConditionalGeneration) -> torch.Tensor:
    found = torch.cat([p.grad.flatten() for p in model.multi_modal_projector.parameters()])
    model.zero_grad()
    return found


def one_by_one(model: ArtemisVLMForConditionalGeneration) -> tuple[float, torch.Tensor]:
    """Summed loss, and the projector's gradient."""
    total = torch.zeros((), dtype=model.dtype)
    for example in examples():
        inputs = model_inputs(model, example)
        inputs |= {name: inputs[name].to(model.dtype) for name in inputs if name == "pixel_values"}
        total = total + model(**inputs).loss * example.n_targets
    total.backward()
    return total.item(), projector_gradients(model)


def all_packed(model: ArtemisVLMForConditionalGeneration, pad_to: int) -> tuple[float, torch.Tensor]:
    """The same of one packed row."""
    use_packed_attention(model.visual, model.language_model)
    batch = pack(examples(), image_token_id=IMAGE_ID, merge_size=2, pad_to=pad_to)
    assert batch.input_ids.shape[0] % pad_to == 0
    assert batch.n_tokens == sum(e.n_tokens for e in examples())
    packed = packed_loss(model, batch, SPEC)
    packed.backward()
    assert all(p.grad is None for n, p in model.named_parameters() if "projector" not in n)
    return packed.item(), projector_gradients(model)


@pytest.mark.parametrize("pad_to", [1, 64])
def test_packed_equals_one_by_one(pad_to: int) -> None:
    """To 1e-6 where rounding is out of the way; in float32, whose own sums are off by more than that, as near as those."""
    models = [tiny_a3().to(dtype) for dtype in (torch.float64, torch.float32)]
    for model in models:
        model.set_training_stage("stage1")
    (exact_loss, exact), (plain_loss, plain) = (one_by_one(model) for model in models)
    (exact_packed_loss, exact_packed), (packed_loss_, packed) = (all_packed(model, pad_to) for model in models)
    assert exact_packed_loss == pytest.approx(exact_loss, rel=1e-7)
    assert packed_loss_ == pytest.approx(plain_loss, rel=1e-6)
    assert (exact_packed - exact).norm() < 1e-6 * exact.norm()
    assert (packed - exact).norm() < 1.5 * (plain - exact).norm()
    assert (packed - plain).norm() < 1.5 * (plain - exact).norm()


def test_packing_order_and_neighbours_do_not_matter() -> None:
    model = tiny_a3()
    use_packed_attention(model.visual, model.language_model)
    samples = examples()
    alone = sum(packed_loss(model, pack([e], image_token_id=IMAGE_ID, merge_size=2), SPEC).item() for e in samples)
    reversed_batch = pack(samples[::-1], image_token_id=IMAGE_ID, merge_size=2)
    assert packed_loss(model, reversed_batch, SPEC).item() == pytest.approx(alone, rel=1e-6)


def test_pack_refuses_what_does_not_fit() -> None:
    good = examples()[0]
    fewer = type(good)(good.uid, good.input_ids, good.n_prompt, good.patches[:16], (4, 4))
    with pytest.raises(SampleError, match="6 image placeholder tokens for 4 image features"):
        pack([fewer], image_token_id=IMAGE_ID, merge_size=2)
    mute = type(good)(good.uid, good.input_ids, good.n_tokens, good.patches, good.grid)
    with pytest.raises(SampleError, match="nothing to predict"):
        pack([mute], image_token_id=IMAGE_ID, merge_size=2)


def test_split_by_tokens_is_even_and_whole() -> None:
    lengths = np.random.default_rng(0).integers(50, 600, 32).tolist()
    groups = split_by_tokens(lengths, 4)
    sums = [sum(lengths[i] for i in g) for g in groups]
    assert sorted(i for g in groups for i in g) == list(range(32))
    assert max(sums) - min(sums) < 60
    assert split_by_tokens([5, 5], 4) == [[0], [1]]


@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_frozen_head_cross_entropy_equals_its_docstring(chunk: int) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(7, 16, requires_grad=True), torch.randn(50, 16)
    targets = torch.randint(50, (7,))
    plain = F.cross_entropy((hidden @ weight.t()).float(), targets, reduction="sum")
    (expected,) = torch.autograd.grad(plain * 0.3, hidden)
    ours = frozen_head_cross_entropy(hidden, weight, targets, chunk)
    (gradient,) = torch.autograd.grad(ours * 0.3, hidden)
    assert ours.item() == pytest.approx(plain.item(), rel=1e-6)
    assert torch.allclose(gradient, expected, rtol=1e-5, atol=1e-6)


def test_one_frame_equals_two() -> None:
    model = tiny_a3()
    inputs = model_inputs(model, examples()[0])
    frame = normalize(torch.from_numpy(examples()[0].patches), SPEC)
    both = model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
    assert torch.equal(model.get_image_features(frame, inputs["image_grid_thw"]), both)
    with pytest.raises(ValueError, match="a patch has 700 values; this tower takes 1536, or 768"):
        model.get_image_features(torch.zeros(24, 700), inputs["image_grid_thw"])


def test_deepstack_mergers_are_kept_and_never_read() -> None:
    model = tiny_a3()
    inputs = model_inputs(model, examples()[0])
    before = model(**inputs).logits
    mergers = [p for n, p in model.named_parameters() if "deepstack_merger_list" in n]
    assert mergers
    for parameter in mergers:
        parameter.data.fill_(float("nan"))
    assert torch.equal(model(**inputs).logits, before)


def test_placeholders_and_features_must_agree() -> None:
    model = tiny_a3()
    inputs = model_inputs(model, examples()[0])
    inputs["input_ids"][0, 2] = 100
    with pytest.raises(SampleError, match="5 image placeholder tokens for 6 image features"):
        model(**inputs)


def greedy_by_hand(model: ArtemisVLMForConditionalGeneration, inputs: dict, n: int) -> list[int]:
    """No cache, no generate: the whole forward for each token."""
    ids, fixed = inputs["input_ids"], {k: inputs[k] for k in ("pixel_values", "image_grid_thw") if k in inputs}
    for _ in range(n):
        ids = torch.cat([ids, model(input_ids=ids, **fixed).logits[:, -1:].argmax(-1)], 1)
    return ids[0, inputs["input_ids"].shape[1] :].tolist()


@torch.no_grad()
def test_generate_sees_the_image_and_batches_mix_rows() -> None:
    model = tiny_a3()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    rows = [{k: v for k, v in model_inputs(model, e).items() if k != "labels"} for e in examples()[:3]]
    alone = [
        model.generate(**row, max_new_tokens=8, do_sample=False)[0, row["input_ids"].shape[1] :].tolist() for row in rows
    ]
    assert alone == [greedy_by_hand(model, row, 8) for row in rows]
    blind = model.generate(input_ids=rows[0]["input_ids"], max_new_tokens=8, do_sample=False)
    assert blind[0, rows[0]["input_ids"].shape[1] :].tolist() != alone[0], "the image makes a difference"

    longest = max(row["input_ids"].shape[1] for row in rows)
    pad = [longest - row["input_ids"].shape[1] for row in rows]
    batch = {
        "input_ids": torch.cat([F.pad(row["input_ids"], (p, 0)) for row, p in zip(rows, pad)]),
        "attention_mask": torch.cat([F.pad(row["attention_mask"], (p, 0)) for row, p in zip(rows, pad)]),
        "pixel_values": torch.cat([row["pixel_values"] for row in rows[:2]]),
        "image_grid_thw": torch.cat([row["image_grid_thw"] for row in rows[:2]]),
    }
    together = model.generate(**batch, max_new_tokens=8, do_sample=False)[:, longest:].tolist()
    assert together == alone


def test_training_stages() -> None:
    model = tiny_a3()
    projector = sum(p.numel() for p in model.multi_modal_projector.parameters())
    total = sum(p.numel() for p in model.parameters())
    assert model.set_training_stage("stage1") == (projector, total)
    decoder = sum(p.numel() for p in model.language_model.parameters())
    assert model.set_training_stage("stage2") == (projector + decoder, total)
    top = sum(p.numel() for p in model.visual.blocks[-1].parameters())
    assert model.set_training_stage("stage1", unfreeze_vision_top_n=1) == (projector + top, total)
    with pytest.raises(ValueError, match="stage3"):
        model.set_training_stage("stage3")


def test_published_shapes() -> None:
    """The published A3: 36.7 M trained weights. (Its model card says about 45 M.)"""
    text = {
        "model_type": "mistral",
        "hidden_size": 5120,
        "num_hidden_layers": 1,
        "vocab_size": 1000,
        "intermediate_size": 64,
    }
    config = ArtemisVLMConfig({"depth": 1, "hidden_size": 1024, "num_heads": 16, "out_hidden_size": 2048}, text)
    with torch.device("meta"):
        model = ArtemisVLMForConditionalGeneration(config)
    assert model.set_training_stage("stage1")[0] == 2048 * 5120 + 5120 + 5120 * 5120 + 5120


def test_tied_decoders_load(tmp_path) -> None:
    model = ArtemisVLMForConditionalGeneration(tiny_config(tie_word_embeddings=True)).eval()
    model.save_pretrained(tmp_path)
    loaded, report = ArtemisVLMForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    inputs = model_inputs(model, examples()[0])
    assert torch.equal(loaded.eval()(**inputs).logits, model(**inputs).logits)


def test_unpacked_attention_restores() -> None:
    model = tiny_a3()
    use_packed_attention(model.visual, model.language_model)
    before = model.language_model.config._attn_implementation
    with unpacked_attention(model.visual, model.language_model):
        assert model.language_model.config._attn_implementation == "sdpa"
    assert model.language_model.config._attn_implementation == before
