"""`VllmEngine`, fed with embeddings: token for token and word for word the other engine, and its manners."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from asking import NEW_TOKENS, OPTIONS, Conversation, Plain

from artemis_vlm import RunError, SampleError, chat, graft
from artemis_vlm.engines import (
    Completion,
    Delta,
    EngineConfig,
    ImageEncoder,
    Request,
    SamplingParams,
    TransformersEngine,
    complete,
    load_engine,
)
from artemis_vlm.engines.vllm import VllmEngine, vllm_prompt
from artemis_vlm.image import patchify

CONFIG = EngineConfig(slots=8, max_length=OPTIONS["max_model_len"], step_tokens=640)


@pytest.fixture(scope="module")
def requests(folder: Path, conversations: Sequence[Conversation]) -> list[Request]:
    tokenizer, encoder = graft.load_tokenizer(folder), ImageEncoder.load(folder, torch.float32)
    made = []
    for number, conversation in enumerate(conversations):
        images = []
        if conversation.image is not None:
            images = encoder.encode([(f"image{number}", patchify(conversation.image, encoder.spec))])
        ids = chat.encode_prompt(
            tokenizer,
            conversation.messages(),
            image_tokens=[len(image.embeds) for image in images],
            enable_thinking=chat.image_thinking(bool(images), image_turn_thinking=False),
        )
        made.append(Request(f"r{number}", tuple(ids), SamplingParams(NEW_TOKENS), tuple(images)))
    return made


@pytest.fixture(scope="module")
def reference(folder: Path, requests: list[Request]) -> dict[str, list[Completion]]:
    """The other engine's answers: greedy, and with stop strings."""
    engine = TransformersEngine.load(folder, replace(CONFIG, step_tokens=None), torch.float32)
    try:
        greedy = asyncio.run(answers(engine, requests))
        stopping = [replace(r, sampling=replace(r.sampling, stop=stops(c.text))) for r, c in zip(requests, greedy)]
        return {"greedy": greedy, "stopped": asyncio.run(answers(engine, stopping))}
    finally:
        engine.close()


@pytest.fixture(scope="module")
def engine(folder: Path, reference: object) -> Iterator[VllmEngine]:
    options = {name: OPTIONS[name] for name in ("enforce_eager", "block_size")}
    engine = VllmEngine.load(folder, CONFIG, torch.float32, "cpu", **options)
    yield engine
    engine.close()


def stops(text: str) -> tuple[str, ...]:
    middle = len(text) // 2
    return (text[middle : middle + 4] or "never", "\x00never")


async def answers(engine: TransformersEngine | VllmEngine, requests: list[Request]) -> list[Completion]:
    return list(await asyncio.gather(*(complete(engine, request) for request in requests)))


async def stream(engine: VllmEngine, requests: list[Request]) -> list[list[Delta]]:
    async def one(request: Request) -> list[Delta]:
        return [delta async for delta in engine.generate(request)]

    return list(await asyncio.gather(*map(one, requests)))


def test_greedy_equals_the_other_engine_and_generate(
    engine: VllmEngine, requests: list[Request], reference: dict[str, list[Completion]], plain: list[Plain]
) -> None:
    got = asyncio.run(answers(engine, requests))
    assert got == reference["greedy"]
    assert [list(c.token_ids) for c in got] == [p.tokens for p in plain]
    again = asyncio.run(answers(engine, requests))  # from another loop, and the prefix cache
    assert again == got
    streamed = asyncio.run(stream(engine, requests))
    assert [[t for d in deltas for t in d.token_ids] for deltas in streamed] == [p.tokens for p in plain]
    assert ["".join(d.text for d in deltas) for deltas in streamed] == [p.text for p in plain]
    assert max(map(len, streamed)) == NEW_TOKENS  # one delta a token
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.kv_tokens) == (0, 0, 0)
    assert stats.generated_tokens >= 2 * sum(len(p.tokens) for p in plain)
    assert stats.kv_capacity_tokens > 10_000
    assert stats.kv_capacity_bytes <= 1.01 * 2**30
    assert stats.steps > NEW_TOKENS


def test_stop_strings_end_the_text_where_the_other_engine_does(
    engine: VllmEngine, requests: list[Request], reference: dict[str, list[Completion]]
) -> None:
    stopping = [replace(r, sampling=replace(r.sampling, stop=stops(c.text))) for r, c in zip(requests, reference["greedy"])]
    got = asyncio.run(answers(engine, stopping))
    assert got == reference["stopped"]
    assert sum(c.finish_reason == "stop" and len(c.token_ids) < NEW_TOKENS for c in got) >= 3


def test_a_seed_draws_the_same_again(engine: VllmEngine, requests: list[Request]) -> None:
    drawn = replace(requests[0], sampling=SamplingParams(NEW_TOKENS, temperature=1.0, top_p=0.95, seed=7))
    other = replace(drawn, sampling=replace(drawn.sampling, seed=8))

    async def main() -> list[Completion]:
        return [await complete(engine, request) for request in (drawn, drawn, other)]

    first, again, different = asyncio.run(main())
    assert first == again != different


def test_leaving_a_stream_frees_it(engine: VllmEngine, requests: list[Request]) -> None:
    long = replace(requests[0], sampling=SamplingParams(300, temperature=2.0, seed=1))

    async def leave() -> None:
        stream = engine.generate(long)
        async for _ in stream:
            break
        await stream.aclose()

    async def cancel_by_id() -> Delta:
        deltas = []
        async for delta in engine.generate(long):
            engine.cancel(long.id)
            deltas.append(delta)
        return deltas[-1]

    async def cancel_at_once() -> Delta:
        stream = engine.generate(long)
        first = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)
        engine.cancel(long.id)
        return await first

    async def cancelled_task() -> None:
        task = asyncio.create_task(complete(engine, long))
        while not engine.stats().running:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    async def main() -> None:
        await leave()
        assert (await cancel_by_id()).finish_reason == "cancelled"
        assert (await cancel_at_once()) == Delta((), "", "cancelled")
        await cancelled_task()
        for _ in range(100):
            if not engine.stats().running:
                return
            await asyncio.sleep(0.01)
        raise AssertionError("a request still runs a second after everyone left")

    asyncio.run(main())
    engine.cancel("nobody")


def test_what_does_not_fit_is_refused_in_the_same_words(engine: VllmEngine, requests: list[Request]) -> None:
    image = next(r for r in requests if r.images)
    wrong = {
        "max_tokens is 640; together they may be 640": replace(image, sampling=SamplingParams(640)),
        "image placeholder tokens for 0 image features": replace(image, images=()),
        "vLLM refuses the request: temperature must be in": replace(
            image, sampling=SamplingParams(NEW_TOKENS, temperature=5.0)
        ),
        "the prompt is empty": replace(image, prompt_ids=(), images=()),
        "image features of width 3; this decoder takes 576": replace(
            image, images=tuple(replace(i, embeds=i.embeds[:, :3]) for i in image.images)
        ),
    }
    for words, request in wrong.items():
        with pytest.raises(SampleError, match=words):
            asyncio.run(complete(engine, request))


def test_each_image_is_one_placeholder_for_vllm(requests: list[Request]) -> None:
    one = next(r for r in requests if r.images)
    two = replace(one, prompt_ids=one.prompt_ids * 2, images=one.images * 2)
    prompt = vllm_prompt(two, 22)
    assert prompt["prompt_token_ids"].count(22) == 2
    assert len(prompt["multi_modal_data"]["image"]["image_embeds"]) == 2 * len(one.images[0].embeds)
    assert prompt["multi_modal_uuids"]["image"] == [one.images[0].key] * 2
    assert vllm_prompt(replace(one, prompt_ids=(1, 2), images=()), 22) == {"prompt_token_ids": [1, 2]}


def test_another_device_than_the_builds_is_refused(folder: Path) -> None:
    with pytest.raises(RunError, match=r"the device is cuda, but this vLLM \(.*\) computes on cpu"):
        load_engine(folder, EngineConfig(kind="vllm"), device="cuda")


def test_a_dead_engine_says_so(engine: VllmEngine, requests: list[Request]) -> None:
    """The last test with this engine: its processes are killed while it answers."""
    long = replace(requests[0], sampling=SamplingParams(300, temperature=2.0, seed=1))

    async def main() -> None:
        stream = engine.generate(long)
        await anext(stream)
        for child in psutil.Process().children(recursive=True):
            if "VLLM" in child.name() or "EngineCore" in " ".join(child.cmdline()):
                os.kill(child.pid, signal.SIGKILL)
        async for _ in stream:
            pass

    with pytest.raises(RunError, match="the engine broke while the request ran"):
        asyncio.run(main())
    with pytest.raises(RunError, match="the engine broke and needs a restart"):
        asyncio.run(complete(engine, long))
    engine.close()
    with pytest.raises(RunError, match="the engine is closed"):
        asyncio.run(complete(engine, long))
