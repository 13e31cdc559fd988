"""What serving costs and gives, over real HTTP: `run(BenchServe(...))`.

ray: requests one after another against the real front, `Api` and Ray Serve, with stages that compute nothing; beside the
same work called in one process.

separate, colocated, beside: a model's throughput with 1, 8, 32 clients that ask again as soon as they are answered, then
the time to the first text and to the end with requests that arrive at random, whatever is answered, at 0.7 of that
rate. Beside it plain `generate`, one request after another, and another server of OpenAI's protocol.
"""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import functools
import io
import json
import random
import statistics
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import aiohttp
import numpy as np
import ray
import torch
from PIL import Image
from ray import serve as ray_serve

from artemis_vlm import ArtemisVLMForConditionalGeneration, chat, graft
from artemis_vlm.engines import EngineConfig, ImageEmbedding, ImageEncoder
from artemis_vlm.errors import RunError
from artemis_vlm.examples import Example
from artemis_vlm.frozen import compute_dtype, use_packed_attention
from artemis_vlm.generation import caption
from artemis_vlm.image import decode_image, patchify
from pipelines import openai, serve
from pipelines.local import free_ports
from pipelines.machine import machine
from pipelines.openai import AnswerFormat, Piece, Usage
from pipelines.serve import Server
from pipelines.stages import Grown, Job, ServeConfig, Stage

PROMPT: Final = "Describe this image in detail."
#: Of the throughput with so many clients, at which requests arrive.
LOAD: Final = 0.7
#: Image tokens, hidden size and type of what the null encoder answers: the demo's, and a 512x512 image's for A2.
NULL_SHAPES: Final = ((64, 576, torch.float32), (256, 5120, torch.bfloat16))
Part = Literal["ray", "plain", "separate", "colocated", "beside"]


@dataclass(frozen=True)
class BenchServe:
    """What is measured."""

    model: str = "runs/demo/a3"
    parts: tuple[Part, ...] = ("ray", "plain", "separate", "colocated")
    concurrency: tuple[int, ...] = (1, 8, 32)
    tokens: int = 24
    """New tokens of an answer at most."""
    text: bool = False
    """Without images."""
    beside: str = ""
    """URL of another server's /v1 with the same model, for the part beside."""
    beside_model: str = ""
    """What that server calls the model."""
    json: str = ""
    """File that takes the figures too."""

    def __post_init__(self) -> None:
        if "beside" in self.parts and not (self.beside and self.beside_model):
            raise RunError("the part beside needs the other server's URL and model: --beside URL --beside-model NAME")


def run(config: BenchServe) -> int:
    """Measures and prints; returns the exit code."""
    about = machine("cpu", dtype=str(compute_dtype("cpu")).removeprefix("torch."))
    print(json.dumps(about), flush=True)
    rows: list[dict[str, Any]] = []
    for part in config.parts:
        for row in _PARTS[part](config):
            rows.append({"part": part, **row})
            print("ROW " + "  ".join(f"{k} {v}" for k, v in rows[-1].items()), flush=True)
    if config.json:
        Path(config.json).write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
    return 0


def photo(seed: int, side: int = 256) -> bytes:
    """A JPEG of blurred noise."""
    coarse = np.random.default_rng(seed).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(coarse).resize((side, side)).save(out, "JPEG")
    return out.getvalue()


# --- what Ray costs --------------------------------------------------------------------------------------------------


class NullEncoder:
    def __init__(self, shape: tuple[int, int, torch.dtype]) -> None:
        tokens, hidden, dtype = shape
        self.embedding = ImageEmbedding("null", torch.zeros(tokens, hidden, dtype=dtype), (2, 2 * tokens))

    async def encode(self, data: bytes) -> ImageEmbedding:
        return self.embedding


class NullDecoder:
    async def complete(self, job: Job, *images: ImageEmbedding) -> Grown:
        return Grown((Piece("content", "Nothing."),), Usage(1, 1), "stop")


def _measure_ray(config: BenchServe) -> Iterator[dict[str, Any]]:
    asked = json.dumps(_body("null", 0, 1, images=True)).encode()
    for shape in NULL_SHAPES:
        served = ServeConfig(model=config.model, name="null", port=free_ports(1)[0])
        with _server(served, functools.partial(_null_app, shape)) as server:
            over_http = asyncio.run(_one_by_one(f"{server.url}/v1/chat/completions", asked, 300))
        inside = asyncio.run(_in_process(shape, asked, 300))
        cost = statistics.median(over_http) - statistics.median(inside)
        name = f"{shape[0]}x{shape[1]} {str(shape[2]).removeprefix('torch.')}"
        yield {
            "embedding": name,
            "http_p50_ms": _ms(over_http, 0.5),
            "http_p99_ms": _ms(over_http, 0.99),
            "in_process_p50_ms": _ms(inside, 0.5),
            "cost_p50_ms": round(1000 * cost, 1),
        }


def _null_app(shape: tuple[int, int, torch.dtype], config: ServeConfig, doors: str) -> Any:
    options: dict[str, Any] = {"ray_actor_options": {"runtime_env": {"env_vars": serve.REPLICA_ENV}}}
    encoder = ray_serve.deployment(NullEncoder).options(name="VisionEncoder", **options).bind(shape)
    decoder = ray_serve.deployment(NullDecoder).options(name="Decoder", **options).bind()
    api: Any = serve.Api
    return api.options(**options).bind(config, decoder, encoder, doors)


async def _one_by_one(url: str, asked: bytes, count: int) -> list[float]:
    taken = []
    async with aiohttp.ClientSession(headers={"Content-Type": "application/json"}) as session:
        for number in range(count + 30):
            started = time.perf_counter()
            async with session.post(url, data=asked) as answer:
                await answer.read()
                if answer.status != 200:
                    raise RunError(f"the server answered with {answer.status}; expected 200")
            if number >= 30:  # the first ones find nothing warm
                taken.append(time.perf_counter() - started)
    return taken


async def _in_process(shape: tuple[int, int, torch.dtype], asked: bytes, count: int) -> list[float]:
    """All that the Api and the stages do, without Ray and HTTP."""
    encoder, decoder, taken = NullEncoder(shape), NullDecoder(), []
    for _ in range(count):
        started = time.perf_counter()
        request = openai.parse_chat(asked)
        for url in request.image_urls():
            openai.image_of_data_uri(url)
        images = [encoder.embedding] * len(request.image_urls())
        grown = await decoder.complete(serve.job_of(request, "0"), *images)
        json.dumps(AnswerFormat("0", "null").whole(grown.pieces, "stop", grown.usage))
        taken.append(time.perf_counter() - started)
    return taken


# --- a model ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Timed:
    """One streamed answer: seconds from when it was due to its first text and its end, and its tokens."""

    first: float
    whole: float
    tokens: int


def _body(model: str, number: int, tokens: int, images: bool) -> dict[str, Any]:
    content: list[dict[str, Any]] = [{"type": "text", "text": PROMPT if images else f"Count from {number} on."}]
    if images:
        data = base64.b64encode(photo(number)).decode()
        content.insert(0, {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{data}"}})
    return {"model": model, "messages": [{"role": "user", "content": content}], "max_tokens": tokens, "temperature": 0}


class Client:
    """Asks one server; every request has a picture of its own."""

    def __init__(self, url: str, model: str, config: BenchServe) -> None:
        self.url, self.model, self.config = url, model, config
        self.number = 0

    def next_body(self) -> bytes:
        self.number += 1
        body = _body(self.model, self.number, self.config.tokens, not self.config.text)
        return json.dumps(body | {"stream": True}).encode()

    async def ask(self, session: aiohttp.ClientSession, asked: bytes, due: float) -> Timed:
        first, tokens = 0.0, 0
        async with session.post(f"{self.url}/chat/completions", data=asked) as answer:
            if answer.status != 200:
                raise RunError(f"{self.url} answered with {answer.status}: {(await answer.text())[:300]}")
            async for chunk in _chunks(answer):
                if "error" in chunk:
                    raise RunError(f"{self.url} ended a stream with an error: {chunk['error']}")
                text = any(c["delta"].get("content") or c["delta"].get("reasoning_content") for c in chunk["choices"])
                tokens += text
                first = first or (time.perf_counter() - due if text else 0.0)
        return Timed(first, time.perf_counter() - due, tokens)

    async def closed(self, clients: int, each: int) -> tuple[float, list[Timed]]:
        """Clients that ask again as soon as they are answered; seconds taken, and answers."""
        bodies = [[self.next_body() for _ in range(each)] for _ in range(clients)]
        async with self.session() as session:

            async def client(mine: list[bytes]) -> list[Timed]:
                return [await self.ask(session, asked, time.perf_counter()) for asked in mine]

            started = time.perf_counter()
            answers = await asyncio.gather(*map(client, bodies))
            return time.perf_counter() - started, [timed for some in answers for timed in some]

    async def open(self, per_second: float, count: int) -> list[Timed]:
        """Requests that arrive at random, whatever is answered."""
        chance = random.Random(0)
        bodies = [self.next_body() for _ in range(count)]
        async with self.session() as session:
            due, tasks = time.perf_counter(), []
            for asked in bodies:
                await asyncio.sleep(due - time.perf_counter())
                tasks.append(asyncio.create_task(self.ask(session, asked, due)))
                due += chance.expovariate(per_second)
            return list(await asyncio.gather(*tasks))

    def session(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            headers={"Content-Type": "application/json"},
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=600),
        )


async def _chunks(answer: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    async for line in answer.content:
        data = line.removeprefix(b"data: ").strip()
        if line.startswith(b"data: ") and data != b"[DONE]":
            yield json.loads(data)


def _measure_client(client: Client, config: BenchServe) -> Iterator[dict[str, Any]]:
    asyncio.run(client.closed(1, 1))  # nothing is warm before
    for clients in config.concurrency:
        seconds, answers = asyncio.run(client.closed(clients, 4 if clients == 1 else 2))
        rate = len(answers) / seconds
        arrived = asyncio.run(client.open(LOAD * rate, max(6, len(answers) // 2)))
        yield {
            "clients": clients,
            "answers_per_s": round(rate, 2),
            "tokens_per_s": round(sum(a.tokens for a in answers) / seconds, 1),
            "arriving_per_s": round(LOAD * rate, 2),
            "ttft_p50_ms": _ms([a.first for a in arrived], 0.5),
            "ttft_p90_ms": _ms([a.first for a in arrived], 0.9),
            "whole_p50_ms": _ms([a.whole for a in arrived], 0.5),
            "whole_p90_ms": _ms([a.whole for a in arrived], 0.9),
        }
    if not config.text:
        yield asyncio.run(_first_and_repeated(client))


async def _first_and_repeated(client: Client) -> dict[str, Any]:
    bodies = [client.next_body() for _ in range(8)]
    async with client.session() as session:
        rounds = [[(await client.ask(session, asked, time.perf_counter())).first for asked in bodies] for _ in (1, 2)]
    return {"ttft_first_image_p50_ms": _ms(rounds[0], 0.5), "ttft_repeated_image_p50_ms": _ms(rounds[1], 0.5)}


def _measure_served(config: BenchServe, colocate: bool) -> Iterator[dict[str, Any]]:
    """Both ways on two cores: one for each stage, or both for the one process."""
    served = ServeConfig(
        model=config.model,
        name="bench",
        port=free_ports(1)[0],
        colocate=colocate,
        text_thinking=False,
        engine=EngineConfig(slots=max(config.concurrency), max_length=512),
        decoder_stage=Stage(num_cpus=2.0 if colocate else 1.0),
        max_requests=4 * max(config.concurrency),
        deadline_s=600.0,
    )
    with _server(served) as server:
        yield from _measure_client(Client(f"{server.url}/v1", "bench", config), config)


def _measure_beside(config: BenchServe) -> Iterator[dict[str, Any]]:
    yield from _measure_client(Client(config.beside.rstrip("/"), config.beside_model, config), config)


def _measure_plain(config: BenchServe) -> Iterator[dict[str, Any]]:
    """Transformers' `generate` on all cores, one request after another."""
    folder = Path(config.model)
    model = ArtemisVLMForConditionalGeneration.from_pretrained(folder, dtype=compute_dtype("cpu")).eval()
    use_packed_attention(model.visual, model.language_model)
    tokenizer, spec = graft.load_tokenizer(folder), ImageEncoder.load(folder, compute_dtype("cpu")).spec
    thinking = chat.image_thinking(not config.text, model.config.image_turn_thinking)
    examples = []
    for number in range(5):
        patches = patchify(decode_image(photo(number)), spec)
        content = [{"type": "image"}, {"type": "text", "text": PROMPT}]
        tokens = [spec.tokens(patches.grid)]
        if config.text:
            patches, content, tokens = dataclasses.replace(patches, pixels=patches.pixels[:0], grid=(0, 0)), content[1:], []
        ids = chat.encode_prompt(
            tokenizer, [{"role": "user", "content": content}], image_tokens=tokens, enable_thinking=bool(thinking)
        )
        examples.append(Example(str(number), np.array(ids, np.int32), len(ids), patches.pixels, patches.grid))
    caption(model, tokenizer, examples[:1], spec, config.tokens)
    started, count = time.perf_counter(), 0
    for example in examples[1:]:
        count += len(tokenizer(caption(model, tokenizer, [example], spec, config.tokens)[0]).input_ids)
    seconds = time.perf_counter() - started
    yield {"clients": 1, "answers_per_s": round(4 / seconds, 2), "tokens_per_s": round(count / seconds, 1)}


@contextmanager
def _server(config: ServeConfig, build: Callable[[ServeConfig, str], Any] | None = None) -> Iterator[Server]:
    server = Server(config, build)
    try:
        yield server
    finally:
        server.stop()
        ray.shutdown()


def _ms(seconds: list[float], share: float) -> float:
    return round(1000 * float(np.quantile(seconds, share)), 1)


_PARTS: Final[dict[Part, Callable[[BenchServe], Iterator[dict[str, Any]]]]] = {
    "ray": _measure_ray,
    "plain": _measure_plain,
    "separate": lambda config: _measure_served(config, colocate=False),
    "colocated": lambda config: _measure_served(config, colocate=True),
    "beside": _measure_beside,
}
