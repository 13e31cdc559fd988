"""The Hugging Face face: processor, collator, pipeline and the model card's own lines."""

from __future__ import annotations

import base64
import io
import json
import logging
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoProcessor,
    AutoTokenizer,
    pipeline,
)

import artemis_vlm
from artemis_vlm import ArtemisDataCollator, ArtemisVLMProcessor, CheckpointError, SampleError, chat
from artemis_vlm.image import decode_image, patchify
from artemis_vlm.modeling import normalize
from artemis_vlm.processing import find_habits

CAT = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Describe this image in detail."}]}]


@pytest.fixture
def image() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 130, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def processor(a3: Path) -> ArtemisVLMProcessor:
    """The checkpoint's. Loading one takes seconds, so tests share it and leave it as it is."""
    return AutoProcessor.from_pretrained(a3)


@pytest.mark.parametrize("auto", [AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSeq2SeqLM])
def test_registered_with_every_auto_class(a3: Path, auto: type, processor: ArtemisVLMProcessor) -> None:
    assert type(auto.from_pretrained(a3)) is artemis_vlm.ArtemisVLMForConditionalGeneration
    assert type(AutoConfig.from_pretrained(a3)) is artemis_vlm.ArtemisVLMConfig
    assert type(processor) is ArtemisVLMProcessor


@torch.no_grad()
def test_the_model_cards_lines(a3: Path, image: Image.Image) -> None:
    model = AutoModelForCausalLM.from_pretrained(a3, dtype=torch.bfloat16).eval()
    tok = AutoTokenizer.from_pretrained(a3)
    processor = ArtemisVLMProcessor(
        tokenizer=tok, vision_config=model.visual.config, min_pixels=32 * 32, max_pixels=512 * 512
    )
    text = processor.apply_chat_template(CAT, add_generation_prompt=True, tokenize=False)
    assert text.endswith("<think>\n\n</think>\n\n"), "this checkpoint's image turns do not think"
    batch = processor(text=text, images=[image], return_tensors="pt")
    assert processor.spec.image_mean == (0.5, 0.5, 0.5), "the checkpoint's own, not CLIP's"
    out = model.generate(**batch, max_new_tokens=5, do_sample=False)
    assert isinstance(tok.decode(out[0][batch["input_ids"].shape[1] :], skip_special_tokens=True), str)

    # The three ways to one prompt agree, and so do the pixels.
    patches = patchify(image, processor.spec)
    n = processor.spec.tokens(patches.grid)
    assert batch["input_ids"][0].tolist() == chat.encode_prompt(tok, CAT, image_tokens=[n], enable_thinking=False)
    frame = normalize(torch.from_numpy(patches.pixels), processor.spec)
    twice = frame.view(len(frame), 3, 1, -1).expand(-1, -1, 2, -1).reshape(len(frame), -1)
    assert torch.equal(batch["pixel_values"], twice)


def test_a_tokenizer_from_nowhere_means_clip(a3: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tok = AutoTokenizer.from_pretrained(a3)
    tok.name_or_path = ""
    with caplog.at_level(logging.WARNING):
        processor = ArtemisVLMProcessor(tokenizer=tok, vision_config=AutoConfig.from_pretrained(a3).vision_config)
    assert processor.spec.image_mean[0] == pytest.approx(0.48145466)
    assert "using CLIP mean/std" in caplog.text
    assert processor.apply_chat_template(CAT, add_generation_prompt=True, tokenize=False).endswith("<think>\n")


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def sources_of_image(image: Image.Image, tmp_path: Path) -> Iterator[list[object]]:
    """One image as a PIL image, a path, a data URI and an http URL."""
    path = tmp_path / "cat.png"
    image.save(path)
    data = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield [image, str(path), data, f"http://127.0.0.1:{server.server_port}/cat.png"]
        server.shutdown()
        thread.join()


def asked(image: object, text: str = "What is it?") -> list[dict]:
    return [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": text}]}]


SAID = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]


def test_pipeline(a3: Path, sources_of_image: list[object]) -> None:
    pipe = pipeline("image-text-to-text", model=str(a3), dtype="auto")
    options = {"max_new_tokens": 5, "do_sample": False, "return_full_text": False}
    answers = [pipe(text=asked(source), **options)[0]["generated_text"] for source in sources_of_image]
    assert len(set(answers)) == 1
    assert pipe(text=SAID, **options)[0]["generated_text"]


def test_images_become_rgb_as_served_ones_do(processor: ArtemisVLMProcessor, image: Image.Image, tmp_path: Path) -> None:
    def pixels(*images: object) -> torch.Tensor:
        return processor(images=list(images), return_tensors="pt")["pixel_values"]

    grey = Image.fromarray(np.arange(64 * 48, dtype=np.uint16).reshape(48, 64) * 20)
    turned = Image.Exif()
    turned[0x0112] = 6
    saved = {"grey16.png": (grey, {}), "alpha.png": (image.convert("RGBA"), {}), "turned.jpg": (image, {"exif": turned})}
    for name, (picture, options) in saved.items():
        path = tmp_path / name
        picture.save(path, **options)
        expected = pixels(decode_image(path.read_bytes()))
        data = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
        with Image.open(path) as opened:
            size = opened.size
            for source in (path, str(path), data, opened):
                assert torch.equal(pixels(source), expected), (name, source)
            assert opened.size == size, "the caller's image is left as it is"
    assert torch.equal(pixels(grey), pixels(tmp_path / "grey16.png"))
    assert pixels(grey).unique().numel() > 100
    for mode in ("L", "RGBA"):
        array = np.array(image.convert(mode))
        for given in (array, torch.from_numpy(array)):
            assert torch.equal(pixels(given), pixels(image.convert(mode)))
    rgb = np.array(image)
    assert torch.equal(pixels(rgb.transpose(2, 0, 1)), pixels(rgb))
    unit = processor(images=rgb.astype(np.float32) / 255, do_rescale=False, do_resize=True, return_tensors="pt")
    assert unit["pixel_values"].max() > 0.9, "who rescales for himself may"


def test_unusable_images_are_told_by_number(processor: ArtemisVLMProcessor, image: Image.Image, tmp_path: Path) -> None:
    image.save(tmp_path / "cat.png")
    cut = tmp_path / "cut.png"
    cut.write_bytes((tmp_path / "cat.png").read_bytes()[:2000])
    text = tmp_path / "cat.txt"
    text.write_text("a cat")
    pixels = np.array(image)
    shapes = r"; expected uint8 \(H, W\), \(H, W, 3\), \(H, W, 4\) or \(3, H, W\)$"
    for bad, says in (
        (tmp_path / "no.png", r"image 2 \(.*/no.png\) cannot be read; expected the path"),
        (str(text), r"image 2 \(.*/cat.txt\) cannot be read; expected the path"),
        ("A" * 5000, r"image 2 \(A{97}\.\.\.\) cannot be read; expected the path"),
        (cut, r"image 2 \(130x90\) is damaged or cut short; give a whole one"),
        (Image.open(io.BytesIO(cut.read_bytes())), r"image 2 \(130x90\) is damaged or cut short; give a whole one"),
        (pixels[..., :2], r"image 2 is a uint8 array of the shape \(90, 130, 2\)" + shapes),
        (pixels[..., 0].astype(np.float32), r"image 2 is a float32 array of the shape \(90, 130\)" + shapes),
        (pixels[:0], r"image 2 is a uint8 array of the shape \(0, 130, 3\)" + shapes),
        (pixels / 255, r"image 2 is a float64 array with values only within \[0, 1\]; give it as uint8 0..255"),
        (torch.rand(3, 40, 40), r"image 2 is a float32 array with values only within \[0, 1\]; give it as uint8 0..255"),
    ):
        with pytest.raises(SampleError, match=says) as refused:
            processor(images=[image, bad])
        assert " at 0x" not in str(refused.value)


def test_save_and_load(processor: ArtemisVLMProcessor, tmp_path: Path) -> None:
    changed = ArtemisVLMProcessor(
        processor.tokenizer, image_processor=processor.image_processor, max_pixels=128 * 128, image_turn_thinking=True
    )
    changed.save_pretrained(tmp_path)
    again = ArtemisVLMProcessor.from_pretrained(tmp_path)
    assert again.to_dict() == changed.to_dict() | {"image_turn_thinking": True}
    assert again.spec == changed.spec
    assert again.spec.max_pixels == 128 * 128
    assert again.chat_template == processor.tokenizer.chat_template
    ids = [[1, 1000, 2000], [1001, 1002]]
    assert again.batch_decode(ids) == processor.tokenizer.batch_decode(ids)
    assert again.decode(ids[0], skip_special_tokens=True) == processor.tokenizer.decode(ids[0], skip_special_tokens=True)
    assert set(again.model_input_names) == {"input_ids", "attention_mask", "pixel_values", "image_grid_thw"}


def test_the_checkpoint_keeps_its_habits(a3: Path, processor: ArtemisVLMProcessor, tmp_path: Path) -> None:
    def write(file: str, fields: dict) -> None:
        (tmp_path / file).write_text(json.dumps(fields))

    def thinks() -> bool:
        return find_habits(str(tmp_path))["image_turn_thinking"]

    saved, config = (json.loads((a3 / file).read_text()) for file in ("processor_config.json", "config.json"))
    assert saved == processor.to_dict(), "a graft writes what the processor would"
    assert saved["image_turn_thinking"] is False
    assert processor.apply_chat_template(CAT, add_generation_prompt=True).endswith("</think>\n\n")
    assert thinks(), "a folder that does not say keeps the template's own default, as the published model does"
    write("config.json", config)
    assert not thinks(), "the model's own config.json may say it"
    write("processor_config.json", saved)
    assert not thinks()
    write("config.json", config | {"image_turn_thinking": True})
    with pytest.raises(CheckpointError, match=r"processor_config.json says image_turn_thinking False, config.json True"):
        thinks()
    write("config.json", {"model_type": "artemis_vlm"})
    assert not thinks()


@pytest.mark.parametrize(
    ("data", "says"), [(b"[]", "holds a JSON list"), (b"5", "holds a JSON int"), (b"\xff", "is not JSON")]
)
@pytest.mark.parametrize("file", ["processor_config.json", "config.json"])
def test_habits_that_are_no_object_are_named(tmp_path: Path, file: str, data: bytes, says: str) -> None:
    (tmp_path / file).write_bytes(data)
    with pytest.raises(CheckpointError, match=f"{file} {says}"):
        ArtemisVLMProcessor.get_processor_dict(tmp_path)


def test_chat_template_tokenizes_and_loads_images(processor: ArtemisVLMProcessor, sources_of_image: list[object]) -> None:
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    batches = [processor.apply_chat_template(asked(source), **options) for source in sources_of_image]
    text = processor.apply_chat_template(asked("-"), add_generation_prompt=True)
    expected = processor(text=text, images=sources_of_image[0], return_tensors="pt")
    openai = [{"type": "image_url", "image_url": {"url": sources_of_image[2]}}, {"type": "text", "text": "What is it?"}]
    batches.append(processor.apply_chat_template([{"role": "user", "content": openai}], **options))
    for batch in batches:
        assert batch.keys() == expected.keys()
        assert all(torch.equal(batch[k], expected[k]) for k in batch)
    assert processor.apply_chat_template(SAID, **options).keys() == {"input_ids", "attention_mask"}


def test_each_conversation_of_a_batch_has_its_own_default(processor: ArtemisVLMProcessor, image: Image.Image) -> None:
    conversations = [asked(image), SAID, asked(image.resize((64, 40)))]
    texts = processor.apply_chat_template(conversations, add_generation_prompt=True)
    assert texts == [processor.apply_chat_template(c, add_generation_prompt=True) for c in conversations]
    assert [t.endswith("</think>\n\n") for t in texts] == [True, False, True]
    batch = processor.apply_chat_template(
        conversations,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": "left"},
    )
    assert batch["attention_mask"][:, -1].all()
    plainly = processor.apply_chat_template(
        [asked(image), tuple(SAID), [{"role": "user", "content": tuple(asked(image.resize((64, 40)))[0]["content"])}]],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        padding=True,
        padding_side="left",
    )
    assert all(torch.equal(plainly[k], batch[k]) for k in batch), "keyword arguments reach the call as processor_kwargs do"
    options = {"tokenize": True, "return_dict": True, "size": {"shortest_edge": 1024, "longest_edge": 4096}}
    options |= {"padding": "max_length", "truncation": True, "text_kwargs": {"max_length": 40}}
    cut = processor.apply_chat_template([SAID, asked(image)], **options)
    assert [len(ids) for ids in cut["input_ids"]] == [40, 40]
    assert cut["image_grid_thw"][0].prod() <= 4096 // 16**2
    large, small = (int(grid.prod()) // 4 for grid in batch["image_grid_thw"])
    assert (batch["input_ids"] == processor.image_token_id).sum(1).tolist() == [large, 0, small]
    assert processor.apply_chat_template(conversations, enable_thinking=True, add_generation_prompt=True)[0].endswith(
        "nk>\n"
    )
    plain = "{% for m in messages %}{{ m.role }}{% endfor %}"
    assert processor.apply_chat_template(asked(image), plain, processor_kwargs={}) == "user", "no think switch, none given"


def test_images_in_a_turn_are_limited(a3: Path, processor: ArtemisVLMProcessor, image: Image.Image) -> None:
    twice = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "image", "image": image}]}]
    answer = {"role": "assistant", "content": "Two."}
    row = {"images": [image, image], "messages": [*twice, answer]}
    message = r"a user turn holds 2 images; this model takes at most 1 in a turn \(max_images_per_turn"
    for refuse in (lambda: processor.apply_chat_template(twice), lambda: ArtemisDataCollator(processor)([row])):
        with pytest.raises(SampleError, match=message):
            refuse()
    with pytest.raises(SampleError, match=message):
        chat.encode_prompt(processor.tokenizer, twice, image_tokens=[4, 4])
    turns = processor.apply_chat_template([*asked(image), answer, *asked(image)], tokenize=True, return_dict=True)
    assert len(turns["image_grid_thw"]) == 2, "one in each of two turns is allowed"
    lax = ArtemisVLMProcessor(processor.tokenizer, image_processor=processor.image_processor, max_images_per_turn=2)
    assert len(lax.apply_chat_template(twice, tokenize=True, return_dict=True)["image_grid_thw"]) == 2
    assert len(ArtemisDataCollator(lax)([row])["image_grid_thw"]) == 2
    assert AutoConfig.from_pretrained(a3, max_images_per_turn=2).max_images_per_turn == 2


def test_batches_mix_rows_and_counts_are_checked(processor: ArtemisVLMProcessor, image: Image.Image) -> None:
    with_image = processor.apply_chat_template(CAT, add_generation_prompt=True, tokenize=False)
    batch = processor(text=[with_image, "plain"], images=[[image], []], padding=True, return_tensors="pt")
    assert batch["input_ids"].shape[0] == 2
    assert (batch["input_ids"] == processor.image_token_id).sum() == batch["image_grid_thw"][0].prod() // 4
    with pytest.raises(SampleError, match=r"holds 1 .* for 2 images"):
        processor(text=with_image, images=[image, image])
    with pytest.raises(SampleError, match=r"holds 1 .* for 0 images"):
        processor(text=with_image)
    with pytest.raises(SampleError, match=r"holds 1 .* for 2 images"):
        processor(text=[with_image, with_image], images=[[image, image], []])
    with pytest.raises(ValueError, match="was given videos or audio"):
        processor(text="plain", videos=[image])
    tokens = processor._get_num_multimodal_tokens(image_sizes=[(image.height, image.width)])
    assert tokens.num_image_tokens == [int(batch["image_grid_thw"][0].prod()) // 4]


def test_collator(processor: ArtemisVLMProcessor, image: Image.Image) -> None:
    rows = [
        {"images": [image], "messages": [*CAT, {"role": "assistant", "content": "A cat on a red mat."}]},
        {
            "images": [],
            "messages": [
                {"role": "user", "content": "2+2?"},
                {"role": "assistant", "content": "<think>\neasy\n</think>\n\n4"},
            ],
        },
    ]
    batch = ArtemisDataCollator(processor)(rows)
    labels = [batch["labels"][i][batch["labels"][i] >= 0] for i in range(2)]
    assert processor.tokenizer.decode(labels[0]) == "A cat on a red mat.<|im_end|>"
    assert processor.tokenizer.decode(labels[1]) == "easy\n</think>\n\n4<|im_end|>"
    own = processor.tokenizer.apply_chat_template(rows[1]["messages"], return_dict=False, enable_thinking=True)
    assert [*batch["input_ids"][1][batch["attention_mask"][1] == 1].tolist(), own[-1]] == own
    assert batch["pixel_values"].shape[0] == batch["image_grid_thw"][0].prod()
    assert not (batch["labels"] == processor.image_token_id).any()
    assert (
        batch["attention_mask"].sum(1) == torch.tensor([len(batch["input_ids"][0]), batch["attention_mask"][1].sum()])
    ).all()


def test_collator_without_detection_opens_what_the_checkpoint_does(
    processor: ArtemisVLMProcessor, image: Image.Image
) -> None:
    answer = {"role": "assistant", "content": "A cat."}
    rows = [{"images": [image], "messages": [*CAT, answer]}, {"messages": [*SAID, answer]}]
    batch = ArtemisDataCollator(processor, auto_detect_thinking=False)(rows)
    ends = ["<think>\n\n</think>\n\nA cat.<|im_end|>", "<think>\nA cat.<|im_end|>"]
    for ids, mask, end in zip(batch["input_ids"], batch["attention_mask"], ends):
        assert processor.tokenizer.decode(ids[mask == 1]).endswith("<|im_start|>assistant\n" + end)
    thinker = ArtemisVLMProcessor(processor.tokenizer, image_processor=processor.image_processor, image_turn_thinking=True)
    ids = ArtemisDataCollator(thinker, auto_detect_thinking=False)(rows[:1])["input_ids"][0]
    assert processor.tokenizer.decode(ids).endswith(ends[1])


def test_an_empty_batch_is_refused(processor: ArtemisVLMProcessor) -> None:
    with pytest.raises(SampleError, match="the batch holds no features; expected at least one"):
        ArtemisDataCollator(processor)([])
