"""`vllm` on an A3 folder: the same prompt ids as ours, and the tokens of plain `generate`, offline and over HTTP."""

from __future__ import annotations

import io
import json
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from asking import NEW_TOKENS, OPTIONS, Conversation, Plain
from PIL import Image
from vllm import LLM, SamplingParams

from artemis_vlm import chat, graft
from artemis_vlm.errors import SampleError
from artemis_vlm.image import CLIP_MEAN, ImageSpec, patchify
from artemis_vlm.modeling import normalize, repeat_frame
from artemis_vlm.vllm_plugin.processing import ArtemisVLMProcessor

GREEDY = SamplingParams(temperature=0, max_tokens=NEW_TOKENS)


def data_uri(image: Image.Image) -> dict[str, Any]:
    out = io.BytesIO()
    image.save(out, "PNG")
    return {"type": "image_url", "image_url": {"url": "data:image/png;base64," + b64encode(out.getvalue()).decode()}}


def messages(conversation: Conversation) -> list[dict[str, Any]]:
    return conversation.messages(None if conversation.image is None else data_uri(conversation.image))


def ids(output: Any) -> list[int]:
    return list(output.outputs[0].token_ids)


def test_a_mixed_batch_equals_plain_generate(llm: LLM, conversations: Sequence[Conversation], plain: list[Plain]) -> None:
    outputs = llm.chat([messages(c) for c in conversations], GREEDY, use_tqdm=False)
    assert [o.prompt_token_ids for o in outputs] == [p.prompt for p in plain]
    assert [ids(o) for o in outputs] == [p.tokens for p in plain]
    assert [o.outputs[0].text for o in outputs] == [p.text for p in plain]


@pytest.mark.parametrize("number", [0, 1])
def test_one_alone_equals_plain_generate(
    llm: LLM, conversations: Sequence[Conversation], plain: list[Plain], number: int
) -> None:
    """An image, and text alone; in the prompt the template has left out, the image's own key makes no difference."""
    llm.reset_prefix_cache()
    (output,) = llm.chat(messages(conversations[number]), GREEDY, use_tqdm=False)
    assert ids(output) == plain[number].tokens


@pytest.mark.parametrize("thinking", [None, True, False])
def test_prompts_are_those_of_the_prompt_path(
    llm: LLM, folder: Path, conversations: Sequence[Conversation], thinking: bool | None
) -> None:
    """Image turns think by the checkpoint's habit, text turns by the template's, both as the caller says."""
    tokenizer, spec = graft.load_tokenizer(folder), ImageSpec.load(folder)
    options = {} if thinking is None else {"enable_thinking": thinking}
    one = SamplingParams(temperature=0, max_tokens=1)
    for conversation in conversations:
        tokens = [] if conversation.image is None else [spec.tokens(patchify(conversation.image, spec).grid)]
        default = chat.image_thinking(bool(tokens), image_turn_thinking=False)
        expected = chat.encode_prompt(
            tokenizer,
            conversation.messages(),
            image_tokens=tokens,
            enable_thinking=default if thinking is None else thinking,
        )
        (output,) = llm.chat(messages(conversation), one, chat_template_kwargs=options, use_tqdm=False)
        assert output.prompt_token_ids == expected


def test_several_turns_and_a_second_image(llm: LLM, folder: Path, conversations: Sequence[Conversation]) -> None:
    first, second = conversations[0], conversations[3]
    turns = [*messages(first), {"role": "assistant", "content": "A scene."}, *messages(second)]
    ours = [*first.messages(), {"role": "assistant", "content": "A scene."}, *second.messages()]
    spec = ImageSpec.load(folder)
    tokens = [spec.tokens(patchify(c.image, spec).grid) for c in (first, second) if c.image]
    expected = chat.encode_prompt(graft.load_tokenizer(folder), ours, image_tokens=tokens, enable_thinking=False)
    (output,) = llm.chat(turns, SamplingParams(temperature=0, max_tokens=1), use_tqdm=False)
    assert output.prompt_token_ids == expected


def test_two_images_in_a_turn_are_refused(llm: LLM, conversations: Sequence[Conversation]) -> None:
    (turn,) = messages(conversations[0])
    turn["content"].insert(0, turn["content"][0])
    with pytest.raises(Exception, match="a turn holds 2 images; this model takes at most 1 in a turn"):
        llm.chat([turn], GREEDY, use_tqdm=False)


def test_a_text_may_come_without_images_that_vllm_has_processed_before(folder: Path) -> None:
    """As vLLM up to 0.24 asks, by default; a text with other images than it says is still refused."""
    processor = ArtemisVLMProcessor.from_pretrained(folder)
    assert [list(ids) for ids in processor(text=chat.IMAGE_TOKEN)["input_ids"]] == [[processor.image_token_id]]
    with pytest.raises(SampleError, match=r"1 .* for 2 images"):
        processor(text=chat.IMAGE_TOKEN, images=[Image.new("RGB", (64, 64))] * 2)


def test_pixels_are_ours(folder: Path, conversations: Sequence[Conversation], tmp_path: Path) -> None:
    """The processor vLLM calls without text gives `image.patchify`'s pixels; with no preprocessor file, CLIP's values."""
    from artemis_vlm.vllm_plugin.processing import ArtemisVLMProcessor

    image, spec = conversations[0].image, ImageSpec.load(folder)
    assert image is not None
    got = ArtemisVLMProcessor.from_pretrained(folder)(images=[image], return_tensors="pt")
    patches = patchify(image, spec)
    model = type("Tower", (), {"patch_embed": torch.nn.Module()})()
    model.patch_embed.proj = torch.nn.Conv3d(3, 1, (2, 16, 16))
    model.patch_embed.in_channels = 3
    assert torch.equal(got["pixel_values"], repeat_frame(normalize(torch.from_numpy(patches.pixels), spec), 2, model))
    for file in folder.iterdir():
        if file.name != "preprocessor_config.json" and file.suffix != ".safetensors":
            shutil.copy(file, tmp_path)
    assert ArtemisVLMProcessor.from_pretrained(tmp_path).spec.image_mean == CLIP_MEAN


# --- over HTTP -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(folder: Path, llm: LLM, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """vLLM's own server on loopback, ended by its pid."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = [f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}") for name, value in OPTIONS.items()]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), *flags]
    command += ["--host=127.0.0.1", f"--port={port}", "--served-model-name=a3", "--max-num-seqs=8"]
    log = tmp_path_factory.mktemp("server") / "log"
    process = subprocess.Popen(command, stdout=log.open("w"), stderr=subprocess.STDOUT)
    try:
        for _ in range(300):
            assert process.poll() is None, log.read_text()[-3000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(1)
        yield f"http://127.0.0.1:{port}/v1/chat/completions"
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def ask(url: str, conversation: Conversation, **fields: Any) -> dict[str, Any]:
    body = {"model": "a3", "temperature": 0, "max_tokens": NEW_TOKENS, "messages": messages(conversation)} | fields
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as response:
        answer: dict[str, Any] = json.load(response)
    return answer


def test_the_curl_line_over_http(server: str, conversations: Sequence[Conversation], plain: list[Plain]) -> None:
    """The body of the model card's curl line, with a data URI; all at once."""
    with ThreadPoolExecutor(len(conversations)) as pool:
        answers = list(pool.map(lambda c: ask(server, c), conversations))
    assert [a["choices"][0]["message"]["content"] for a in answers] == [p.text for p in plain]
    assert [a["usage"]["prompt_tokens"] for a in answers] == [len(p.prompt) for p in plain]
    assert [a["usage"]["completion_tokens"] for a in answers] == [len(p.tokens) for p in plain]


def test_two_images_in_a_turn_are_a_400(server: str, conversations: Sequence[Conversation]) -> None:
    (turn,) = messages(conversations[0])
    turn["content"].insert(0, turn["content"][0])
    with pytest.raises(urllib.error.HTTPError) as refused:
        ask(server, conversations[0], messages=[turn])
    assert refused.value.code == 400
    assert "takes at most 1 in a turn" in refused.value.read().decode()
