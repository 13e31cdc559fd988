"""What users of Transformers expect of a model: beams, caches, masks, embeddings, resizing, training, loading."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import IMAGE_ID, SPEC, model_inputs, random_example, tiny_a3
from PIL import Image
from safetensors import safe_open
from test_model import greedy_by_hand
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    DynamicCache,
    Trainer,
    TrainingArguments,
)

from artemis_vlm import ArtemisDataCollator, ArtemisVLMForConditionalGeneration, ArtemisVLMProcessor, SampleError, graft

GREEDY = {"max_new_tokens": 6, "do_sample": False}


def model_of(decoder: str = "mistral", **text: Any) -> ArtemisVLMForConditionalGeneration:
    model = tiny_a3(decoder=decoder, **text)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def rows_of(model: ArtemisVLMForConditionalGeneration) -> list[dict[str, torch.Tensor]]:
    """Three prompts: a wide image, no image, a small image."""
    rng = np.random.default_rng(0)
    shapes = [((4, 6), 3, 1), ((0, 0), 9, 1), ((2, 2), 6, 1)]
    rows = [model_inputs(model, random_example(rng, f"u{i}", *shape)) for i, shape in enumerate(shapes)]
    return [{k: v for k, v in row.items() if k != "labels"} for row in rows]


def left_padded(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    longest = max(row["input_ids"].shape[1] for row in rows)
    batch = {
        name: torch.cat([F.pad(row[name], (longest - row[name].shape[1], 0)) for row in rows])
        for name in ("input_ids", "attention_mask")
    }
    for name in ("pixel_values", "image_grid_thw"):
        batch[name] = torch.cat([row[name] for row in rows if name in row])
    return batch


def continuations(output: torch.Tensor, inputs: dict[str, torch.Tensor]) -> list[list[int]]:
    return output[:, inputs["input_ids"].shape[1] :].tolist()


@torch.no_grad()
@pytest.mark.parametrize("decoder", ["mistral", "llama", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_any_decoder_sees_and_round_trips(decoder: str, tied: bool, tmp_path: Path) -> None:
    model = model_of(decoder, tie_word_embeddings=tied)
    row = rows_of(model)[0]
    answer = continuations(model.generate(**row, **GREEDY), row)[0]
    assert answer == greedy_by_hand(model, row, 6)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as stored:
        assert ("language_model.lm_head.weight" in stored.keys()) is not tied  # noqa: SIM118 - no mapping
    loaded = ArtemisVLMForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) is tied
    assert torch.equal(loaded(**row).logits, model(**row).logits)


@torch.no_grad()
@pytest.mark.parametrize("decoder", ["llama", "qwen3"])
def test_any_decoder_grafts(decoder: str, sources: graft.Sources, tmp_path: Path) -> None:
    source = tiny_a3(seed=3, decoder=decoder, vocab_size=131072, hidden_size=16, head_dim=4)
    source.language_model.to(torch.bfloat16).save_pretrained(tmp_path / "decoder")
    for file in set(graft.TEXT_FILES) - {"generation_config.json"}:
        if (sources.decoder / file).exists():
            shutil.copyfile(sources.decoder / file, tmp_path / "decoder" / file)
    parts = graft.Sources(sources.tower, tmp_path / "decoder")
    graft.write_model(tmp_path / "a3", parts, graft.new_projector(parts), SPEC)
    assert graft.verify(tmp_path / "a3", parts) == []
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "a3", dtype="auto").eval()
    tower = graft.load_tower(sources.tower, torch.bfloat16)
    text = AutoModelForCausalLM.from_pretrained(parts.decoder, dtype="auto")
    composed = ArtemisVLMForConditionalGeneration(loaded.config, tower, text).eval()
    composed.multi_modal_projector.to(torch.bfloat16)
    graft.load_projector(composed.multi_modal_projector, graft.read_projector(tmp_path / "a3"))
    row = rows_of(loaded)[0]
    assert torch.equal(loaded(**row).logits, composed(**row).logits)


@torch.no_grad()
def test_beams_and_several_answers_keep_each_image_with_its_row() -> None:
    model = model_of()
    rows = rows_of(model)
    batch = left_padded(rows)
    beams = {"num_beams": 3, "num_return_sequences": 2, **GREEDY}
    alone = [answer for row in rows for answer in continuations(model.generate(**row, **beams), row)]
    calls: list[int] = []
    handle = model.visual.register_forward_hook(lambda *_: calls.append(1))
    assert continuations(model.generate(**batch, **beams), batch) == alone
    assert len(calls) == 1, "images are encoded once, not once a beam"
    handle.remove()

    images = [{k: row[k] for k in ("pixel_values", "image_grid_thw")} for row in rows if "pixel_values" in row]
    expanded = {k: batch[k].repeat_interleave(2, 0) for k in ("input_ids", "attention_mask")}
    expanded |= {k: torch.cat([image[k] for image in images for _ in range(2)]) for k in images[0]}
    greedy = [answer for row in rows for answer in continuations(model.generate(**row, **GREEDY), row) * 2]
    assert continuations(model.generate(**expanded, **GREEDY), expanded) == greedy
    torch.manual_seed(0)
    sampled = model.generate(**batch, max_new_tokens=4, do_sample=True, top_k=1, num_return_sequences=2)
    assert [ids[:4] for ids in continuations(sampled, batch)] == [ids[:4] for ids in greedy]

    batch["pixel_values"], batch["image_grid_thw"] = rows[0]["pixel_values"], rows[0]["image_grid_thw"]
    with pytest.raises(SampleError, match="7 image placeholder tokens for 6 image features"):
        model.generate(**batch, **beams)


@torch.no_grad()
@pytest.mark.parametrize("how", [{"use_cache": False}, {"cache_implementation": "static"}])
def test_other_caches_give_the_same(how: dict[str, Any]) -> None:
    model = model_of()
    batch = left_padded(rows_of(model))
    assert torch.equal(model.generate(**batch, **GREEDY, **how), model.generate(**batch, **GREEDY))


@torch.no_grad()
def test_a_cache_is_continued() -> None:
    """A second turn's tokens after a cache of the first; images that the cache holds are given again, or a new one."""
    model = model_of()
    first, text, second = rows_of(model)
    for then in (text, second):
        whole = {k: torch.cat([first[k], then[k]], 1) for k in ("input_ids", "attention_mask")}
        for name in ("pixel_values", "image_grid_thw"):
            whole[name] = torch.cat([row[name] for row in (first, then) if name in row])
        cache = DynamicCache(config=model.config.text_config)
        model(**first, past_key_values=cache, use_cache=True)
        with_features = {k: whole[k] for k in ("input_ids", "attention_mask")}
        with_features["image_features"] = model.get_image_features(whole["pixel_values"], whole["image_grid_thw"])
        for inputs in (whole, with_features):
            continued = model.generate(**inputs, past_key_values=copy.deepcopy(cache), **GREEDY)
            assert torch.equal(continued, model.generate(**whole, **GREEDY))


@torch.no_grad()
def test_an_assistant_changes_nothing() -> None:
    model, assistant = model_of(), model_of()
    for row in rows_of(model):
        assert torch.equal(model.generate(**row, assistant_model=assistant, **GREEDY), model.generate(**row, **GREEDY))


@torch.no_grad()
def test_prompts_with_images_are_not_cut_into_chunks() -> None:
    model = model_of()
    image, text, _ = rows_of(model)
    assert torch.equal(model.generate(**text, prefill_chunk_size=3, **GREEDY), model.generate(**text, **GREEDY))
    with pytest.raises(SampleError, match="prefill_chunk_size is 3; a prompt with images cannot be cut"):
        model.generate(**image, prefill_chunk_size=3, **GREEDY)


def test_a_graft_in_memory_ends_answers_as_its_decoder_does(sources: graft.Sources, tmp_path: Path) -> None:
    decoder = AutoModelForCausalLM.from_pretrained(sources.decoder)
    shutil.copytree(sources.decoder, tmp_path / "decoder")
    decoder.generation_config.eos_token_id = [2, 25]
    decoder.save_pretrained(tmp_path / "decoder")
    grafted = ArtemisVLMForConditionalGeneration.from_a2_and_vision(str(tmp_path / "decoder"), tiny_a3().visual)
    assert grafted.generation_config.eos_token_id == [2, 25]
    loaded = graft.load_frozen(graft.Sources(sources.tower, tmp_path / "decoder"), torch.float32, "cpu")
    assert loaded.generation_config.eos_token_id == [2, 25]


@torch.no_grad()
def test_embeddings_in_place_of_ids() -> None:
    model = model_of()
    image, text, _ = rows_of(model)
    for row in (image, text):
        expected = model(**row).logits
        inputs = {k: v for k, v in row.items() if k != "input_ids"}
        inputs["inputs_embeds"] = model.get_input_embeddings()(row["input_ids"])
        assert torch.equal(model(**inputs).logits, expected)
        for beams in (1, 2):
            with_ids = continuations(model.generate(**row, num_beams=beams, **GREEDY), row)
            assert model.generate(**inputs, num_beams=beams, **GREEDY).tolist() == with_ids
    features = model.get_image_features(image["pixel_values"], image["image_grid_thw"])
    precomputed = model(input_ids=image["input_ids"], attention_mask=image["attention_mask"], image_features=features)
    assert torch.equal(precomputed.logits, model(**image).logits)
    with pytest.raises(ValueError, match="neither input_ids nor inputs_embeds"):
        model(attention_mask=text["attention_mask"])
    with pytest.raises(ValueError, match="pixel_values need image_grid_thw"):
        model(input_ids=image["input_ids"], pixel_values=image["pixel_values"])


@torch.no_grad()
def test_image_features_as_transformers_gives_them() -> None:
    model = model_of()
    batch = left_padded(rows_of(model))
    pixels, grid = batch["pixel_values"], batch["image_grid_thw"]
    output = model.get_image_features(pixels, grid, return_dict=True, output_hidden_states=True)
    assert [len(image) for image in output.pooler_output] == [6, 1]
    assert torch.equal(torch.cat(output.pooler_output), model.get_image_features(pixels, grid))
    assert output.last_hidden_state.shape == (28, model.config.vision_config.hidden_size)
    assert len(output.hidden_states) == model.config.vision_config.depth + 1
    as_tuple = model(**batch, return_dict=False)
    assert torch.equal(as_tuple[0], model(**batch).logits)


@torch.no_grad()
def test_masks_positions_and_logits_to_keep() -> None:
    model = model_of()
    batch = left_padded(rows_of(model))
    mask = batch["attention_mask"].bool()
    expected = model(**batch, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    length = mask.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril() & mask[:, None, None, :]
    causal |= torch.eye(length, dtype=torch.bool)  # padding sees itself: a row with nothing to see is NaN
    four_d = {**batch, "attention_mask": causal, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    assert torch.allclose(model(**four_d).logits[mask], expected[mask], atol=1e-5)
    for row, alone in enumerate(rows_of(model)):
        assert torch.allclose(expected[row, mask[row]], model(**alone).logits[0], atol=1e-5)
    assert torch.allclose(model(**batch, logits_to_keep=2).logits, model(**batch).logits[:, -2:], atol=1e-5)
    widths: list[int] = []
    model.get_output_embeddings().register_forward_hook(lambda _, inputs, __: widths.append(inputs[0].shape[1]))
    model.generate(**batch, **GREEDY)
    assert widths == [1] * 6, "a prompt's logits are not computed"


@torch.no_grad()
def test_compile() -> None:
    model = model_of()
    row = rows_of(model)[0]
    compiled = torch.compile(model.forward, backend="eager")
    assert torch.allclose(compiled(**row).logits, model(**row).logits, atol=1e-5)
    ids = row["input_ids"].clamp(min=IMAGE_ID + 1)
    whole = torch.compile(model.forward, backend="eager", fullgraph=True)
    assert torch.allclose(whole(input_ids=ids, use_cache=False).logits, model(input_ids=ids).logits, atol=1e-5)
    assert model._can_compile_fullgraph


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True])
def test_resizing_and_setting_embeddings(tied: bool, tmp_path: Path) -> None:
    model = model_of(tie_word_embeddings=tied)
    row = rows_of(model)[0]
    before = model(**row).logits
    for size in (310, 300):
        embeddings = model.resize_token_embeddings(size, mean_resizing=False)
        assert embeddings is model.get_input_embeddings()
        assert model.vocab_size == model.config.text_config.vocab_size == model.language_model.config.vocab_size == size
        output = model(**row, labels=row["input_ids"])
        assert output.logits.shape[-1] == size
        assert torch.allclose(output.logits[..., :300], before, atol=1e-5)
        assert torch.isfinite(output.loss)
    model.resize_token_embeddings(301, pad_to_multiple_of=64, mean_resizing=False)
    model.save_pretrained(tmp_path)
    assert torch.equal(ArtemisVLMForConditionalGeneration.from_pretrained(tmp_path)(**row).logits, model(**row).logits)
    head = torch.nn.Linear(64, 320, bias=False)
    model.set_output_embeddings(head)
    assert model.get_output_embeddings() is head
    assert model.base_model is model.language_model


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_gradient_checkpointing(stage: str) -> None:
    def gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
        model = model_of().train()
        model.set_training_stage(stage, unfreeze_vision_top_n=1)
        if checkpointing:
            model.gradient_checkpointing_enable()
        row = rows_of(model)[0]
        model(**row, labels=row["input_ids"], use_cache=False).loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    plain, saved = gradients(False), gradients(True)
    assert plain.keys() == saved.keys()
    assert {n.split(".")[0] for n in plain} >= {"multi_modal_projector", "visual"}
    assert all(torch.allclose(plain[n], saved[n], rtol=1e-4, atol=1e-6) for n in plain)


def test_trainer(a3: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(a3, dtype=torch.float32)
    model.set_training_stage("stage1")
    before = {n: p.clone() for n, p in model.named_parameters()}
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8))
    question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}
    rows = [
        {"images": [image], "messages": [question, {"role": "assistant", "content": "A cat."}]},
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]},
    ]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=2,
        learning_rate=0.1,
        gradient_checkpointing=True,
        remove_unused_columns=False,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    collator = ArtemisDataCollator(ArtemisVLMProcessor.from_pretrained(a3))
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collator)
    assert np.isfinite(trainer.train().training_loss)
    changed = {n.split(".")[0] for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {"multi_modal_projector"}
    trainer.save_model(str(tmp_path / "saved"))
    saved = ArtemisVLMForConditionalGeneration.from_pretrained(tmp_path / "saved")
    assert torch.equal(saved.multi_modal_projector.fc1.weight, model.multi_modal_projector.fc1.weight)


@torch.no_grad()
def test_device_map(a3: Path) -> None:
    plain = AutoModelForImageTextToText.from_pretrained(a3, dtype="auto")
    placed = AutoModelForImageTextToText.from_pretrained(a3, dtype="auto", device_map="auto")
    row = rows_of(plain)[0]
    assert torch.equal(placed(**row).logits, plain(**row).logits)
    assert {"Qwen3VLVisionBlock", "MistralDecoderLayer"} <= set(placed._no_split_modules)
