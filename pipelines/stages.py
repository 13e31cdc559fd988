"""What serving is made of behind the Api: its configuration, and the two stages that hold weights.

`VisionEncoder` answers with a reference to an embedding, which `Decoder` reads; with `colocate` the decoder's process
encodes too. Knows nothing of HTTP: a conversation comes in, an answer grows.
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from ray import serve
from ray.util import metrics

from artemis_vlm import chat, engines
from artemis_vlm.engines import EngineConfig, EngineStats, ImageEmbedding, ImageEncoder, SamplingParams
from artemis_vlm.errors import RunError, SampleError
from artemis_vlm.frozen import compute_dtype
from artemis_vlm.graft import load_config, load_tokenizer
from artemis_vlm.image import Patches, decode_image, patchify
from pipelines.fetch import FetchConfig
from pipelines.guard import is_loopback
from pipelines.openai import AnswerParser, Piece, Usage
from pipelines.storage import fetch_model

#: Logical CPUs of an Api replica, which mostly waits.
API_CPUS: Final = 0.1
#: Bounds of the histograms.
SECONDS: Final = [0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100]


@dataclass(frozen=True)
class Stage:
    """Replicas of a stage and what each holds."""

    min_replicas: int = 1
    max_replicas: int = 1
    num_cpus: float = 1.0
    num_gpus: float = 0.0
    resources: dict[str, float] = field(default_factory=dict)
    #: Requests in a replica above which another is started.
    target_ongoing: float = 8.0

    def __post_init__(self) -> None:
        if not 1 <= self.min_replicas <= self.max_replicas:
            raise RunError(f"replicas are {self.min_replicas} to {self.max_replicas}; expected 1 or more, in order")
        if min(self.num_cpus, self.num_gpus) < 0 or not self.target_ongoing > 0:
            raise RunError(
                f"a replica takes {self.num_cpus:g} CPUs, {self.num_gpus:g} GPUs and {self.target_ongoing:g} requests; "
                "expected 0 or more of the first two and above 0 of the last"
            )


@dataclass(frozen=True)
class ServeConfig:
    """A server. Every field is a flag of `jobs/serve.py` and, but for host and port, a key of `jobs/serve.yaml`."""

    model: str
    """A3 folder, s3:// URI or hub id."""
    name: str = ""
    """What clients call the model; its folder's name unless given."""
    host: str = "127.0.0.1"
    port: int = 8000
    key_hashes: tuple[str, ...] = ()
    """sha256 of each API key, in hex. Without one, only a loopback address may be bound."""
    dtype: str = "auto"
    """Of all computing; auto is bfloat16 where the device computes in it, else float32."""
    device: str = "cpu"
    colocate: bool = False
    """Encoder and decoder in one process."""
    text_thinking: bool | None = None
    """Whether text turns think unless the request says; None leaves it to the chat template."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    encoder_stage: Stage = field(default_factory=Stage)
    decoder_stage: Stage = field(default_factory=Stage)
    api_replicas: int = 1
    cache_bytes: int = engines.encoder.CACHE_BYTES
    """Of embeddings, in each encoder."""
    fetch: FetchConfig = field(default_factory=FetchConfig)
    max_requests: int = 64
    """In each Api replica at once; more are answered with 429."""
    max_body_bytes: int = 28 * 1024**2
    body_timeout_s: float = 30.0
    deadline_s: float = 120.0
    """For a whole request."""

    def __post_init__(self) -> None:
        if self.dtype != "auto" and not isinstance(getattr(torch, self.dtype, None), torch.dtype):
            raise RunError(f"dtype is {self.dtype}; expected auto or one of torch's, such as float32")
        for name in ("api_replicas", "max_requests", "max_body_bytes", "body_timeout_s", "deadline_s"):
            if not getattr(self, name) > 0:
                raise RunError(f"{name} is {getattr(self, name)}; it must be above 0")
        if self.cache_bytes < 0:
            raise RunError(f"cache_bytes is {self.cache_bytes}; it must be at least 0")
        if not 0 < self.port < 2**16:
            raise RunError(f"port is {self.port}; expected 1 to {2**16 - 1}")
        if any(len(h) != 64 or set(h) - set("0123456789abcdef") for h in self.key_hashes):
            raise RunError("key_hashes must be sha256 sums in hex: printf %s KEY | sha256sum")
        if not self.key_hashes and not is_loopback(self.host):
            raise RunError(f"host is {self.host}, which others can reach; give key_hashes or bind 127.0.0.1")

    @property
    def model_name(self) -> str:
        return self.name or self.model.rstrip("/").rsplit("/", 1)[-1]

    @property
    def torch_dtype(self) -> torch.dtype:
        return compute_dtype(self.device) if self.dtype == "auto" else getattr(torch, self.dtype)

    @property
    def stages(self) -> list[Stage]:
        return [self.decoder_stage] + ([] if self.colocate else [self.encoder_stage])

    @property
    def logical_cpus(self) -> int:
        """What all replicas ask for, and as much again for a rolling update."""
        return 2 * math.ceil(API_CPUS * self.api_replicas + sum(s.max_replicas * s.num_cpus for s in self.stages))

    @property
    def least(self) -> list[dict[str, float]]:
        """What each replica asks of its node, by Ray's names, with as few replicas as there may be."""
        replicas = [s for s in self.stages for _ in range(s.min_replicas)]
        asked = [{"CPU": s.num_cpus, "GPU": s.num_gpus, **s.resources} for s in replicas]
        return asked + [{"CPU": API_CPUS}] * self.api_replicas


@dataclass(frozen=True)
class Job:
    """What the decoder is asked: a conversation without image data, and how to answer."""

    id: str
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    thinking: bool | None
    limit: int | None
    temperature: float
    top_p: float
    seed: int | None
    stop: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Grown:
    """What an answer gained; the last has a finish reason."""

    pieces: tuple[Piece, ...]
    usage: Usage
    finish_reason: str | None = None


class TooLong(SampleError):
    """A conversation and its answer do not fit the engine."""


class Eyes:
    """Image files to embeddings, for many requests at once: what came in while the tower was busy goes in one call."""

    def __init__(self, config: ServeConfig) -> None:
        folder = fetch_model(config.model).path
        self.encoder = ImageEncoder.load(folder, config.torch_dtype, config.device, config.cache_bytes)
        self.calls = 0
        self.seconds = metrics.Histogram("a3_encode_seconds", "From image file to embedding.", SECONDS)
        self.batch = metrics.Histogram("a3_encode_batch", "Images in one call of the tower.", [1, 2, 4, 8, 16])
        self.hits = metrics.Counter("a3_encoder_cache_hits", "Images found in the cache.")
        self.misses = metrics.Counter("a3_encoder_cache_misses", "Images that had to be encoded.")

    async def embed(self, data: bytes) -> ImageEmbedding:
        """Raises SampleError on what is no image; its size is checked before it is decoded."""
        started = time.perf_counter()
        key = engines.image_key(data)
        found = self.encoder.cache.get(key)
        (self.misses if found is None else self.hits).inc()
        if found is None:
            patches = await asyncio.to_thread(self._cut, data)
            found = await self._tower((key, patches))
        self.seconds.observe(time.perf_counter() - started)
        return found

    def _cut(self, data: bytes) -> Patches:
        return patchify(decode_image(data), self.encoder.spec)

    @serve.batch(max_batch_size=16, batch_wait_timeout_s=0.0)  # type: ignore[untyped-decorator]
    async def _tower(self, images: list[tuple[str, Patches]]) -> list[ImageEmbedding]:
        self.calls += 1
        self.batch.observe(len(images))
        return await asyncio.to_thread(self.encoder.encode, images)


@serve.deployment
class VisionEncoder:
    """Tower and projector. A process of its own, so hostile images meet neither the Api nor the decoder."""

    def __init__(self, config: ServeConfig) -> None:
        self.eyes = Eyes(config)

    async def encode(self, data: bytes) -> ImageEmbedding:
        """An image file's embedding; raises SampleError on what is no image."""
        return await self.eyes.embed(data)

    def calls(self) -> int:
        """How often the tower has run."""
        return self.eyes.calls


@serve.deployment
class Decoder:
    """An engine, and the prompt path."""

    def __init__(self, config: ServeConfig) -> None:
        folder = fetch_model(config.model).path
        self.config = config
        self.tokenizer = load_tokenizer(folder)
        self.model_config = load_config(folder)
        added = self.tokenizer.get_added_vocab()
        self.think_tokens = added.get("<think>", -1), added.get("</think>", -1)
        self.eyes = Eyes(config) if config.colocate else None
        self.engine = engines.load_engine(folder, config.engine, config.torch_dtype, config.device)
        self.gauges = {
            name: metrics.Gauge(f"a3_engine_{name}", text)
            for name, text in (
                ("running", "Requests in the batch."),
                ("waiting", "Requests that wait for a slot."),
                ("kv_tokens", "Tokens in the KV cache."),
                ("steps", "Steps since the start."),
                ("prompt_tokens", "Prompt tokens since the start."),
                ("generated_tokens", "New tokens since the start."),
                ("busy_s", "Seconds computing since the start."),
            )
        }

    def check_health(self) -> None:
        self.engine.check()
        self._observe()

    def _observe(self) -> None:
        stats = self.engine.stats()
        for name, gauge in self.gauges.items():
            gauge.set(getattr(stats, name))

    def stats(self) -> EngineStats:
        return self.engine.stats()

    async def generate(self, job: Job, *images: ImageEmbedding | bytes, stream: bool = True) -> AsyncIterator[Grown]:
        """The answer as it grows.

        Args:
            images: embeddings, or where the stages share a process, image files.
            stream: whether anyone reads it as it grows.

        Raises:
            SampleError: the conversation cannot be answered as it is.
            RunError: the engine is broken, or broke the answer off.
        """
        embedded = [image if isinstance(image, ImageEmbedding) else await self._embed(image) for image in images]
        request, thinks = await asyncio.to_thread(self._request, job, tuple(embedded), stream)
        parser = AnswerParser("reasoning" if thinks else "content")
        plain = request.sampling.skip_special_tokens
        count = 0
        async for delta in self.engine.generate(request):
            count += len(delta.token_ids)
            if delta.finish_reason == "cancelled":
                raise engines.broken_off(request)
            last = delta.finish_reason is not None
            spelled = [Piece("content", delta.text)] if delta.text else []
            pieces = spelled if plain else list(parser.feed(delta.text, last))
            if pieces or last:
                yield Grown(tuple(pieces), Usage(len(request.prompt_ids), count), delta.finish_reason)
        self._observe()

    async def complete(self, job: Job, *images: ImageEmbedding | bytes) -> Grown:
        """The whole answer."""
        pieces: list[Piece] = []
        async for grown in self.generate(job, *images, stream=False):
            pieces += grown.pieces
        return dataclasses.replace(grown, pieces=tuple(pieces))

    async def _embed(self, image: bytes) -> ImageEmbedding:
        assert self.eyes is not None
        return await self.eyes.embed(image)

    def _request(self, job: Job, images: tuple[ImageEmbedding, ...], stream: bool) -> tuple[engines.Request, bool]:
        """The engine's request, and whether the prompt left a thought open."""
        thinking = job.thinking
        if thinking is None:
            thinking = chat.image_thinking(bool(images), self.model_config.image_turn_thinking)
        if thinking is None and not images:
            thinking = self.config.text_thinking
        ids = chat.encode_prompt(
            self.tokenizer,
            job.messages,
            image_tokens=[len(image.embeds) for image in images],
            enable_thinking=thinking,
            tools=job.tools,
            max_images_per_turn=self.model_config.max_images_per_turn,
        )
        room = self.engine.max_length - len(ids)
        if room < (job.limit or 1):
            limit = f" and max_tokens is {job.limit}; together they may be" if job.limit else "; with its answer it may have"
            raise TooLong(f"the prompt has {len(ids)} tokens{limit} {self.engine.max_length}")
        thinks = self._thought_is_open(ids)
        sampling = SamplingParams(
            max_tokens=job.limit or room,
            temperature=job.temperature,
            top_p=job.top_p,
            seed=job.seed,
            stop=job.stop,
            skip_special_tokens=not (thinks or job.tools),
        )
        return engines.Request(job.id, tuple(ids), sampling, images, stream), thinks

    def _thought_is_open(self, ids: list[int]) -> bool:
        marks = [token for token in ids[-16:] if token in self.think_tokens]
        return bool(marks) and marks[-1] == self.think_tokens[0]
