"""What captioning is made of: its configuration, and the stages that Ray Data streams rows through.

    read_blocks ─► Decode (CPU) ─► Encode (tower, projector) ─► Caption (engine)

Each takes tables of rows and gives tables of rows; a row that fails carries its error on. Pixels, prompts, encoder and
engine are those of training and serving. Nothing here writes.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import pyarrow as pa
import torch

from artemis_vlm import chat, engines, graft
from artemis_vlm.engines import EngineConfig, EngineKind, ImageEmbedding, ImageEncoder, SamplingParams
from artemis_vlm.errors import RunError, SampleError
from artemis_vlm.image import ImageSpec, Patches, decode_image, patchify
from pipelines.feed import by_bytes, in_blocks, whole
from pipelines.fetch import FetchConfig, Fetcher
from pipelines.parts import tar_members
from pipelines.pictures import PictureShard, image_extension, open_pictures
from pipelines.storage import fetch_model

Row = tuple[Any, ...]

#: Of blocks between the stages.
BLOCK_BYTES: Final = 4 << 20
#: Images that are fetched together: many times the connections, so that slow hosts keep few of these waiting.
FETCH_ROWS: Final = 256
#: Of patches that wait to be sorted.
SORTED_BYTES: Final = 64 << 20
#: Images in one call of the tower.
ENCODE_ROWS: Final = 16
#: Requests that an engine has at least, as a multiple of its slots: what finishes is followed at once.
IN_FLIGHT: Final = 3
SUFFIXES: Final = {"parquet": "parquet", "webdataset": "tar"}
FORMAT = Literal["parquet", "webdataset"]

_PLACE: Final = {"shard": pa.int64(), "row": pa.int64(), "rows": pa.int64(), "key": pa.string(), "error": pa.string()}
RAW: Final = pa.schema(_PLACE | {"files": pa.large_binary(), "image": pa.large_binary(), "url": pa.string()})
_IMAGE: Final = {"image_key": pa.string(), "grid_h": pa.int64(), "grid_w": pa.int64()}
DECODED: Final = pa.schema(_PLACE | {"files": pa.large_binary()} | _IMAGE | {"patches": pa.large_binary()})
EMBEDDED: Final = pa.schema(_PLACE | {"files": pa.large_binary()} | _IMAGE | {"embeds": pa.large_binary()})
CAPTIONED: Final = pa.schema(
    _PLACE
    | {"files": pa.large_binary(), "caption": pa.string(), "finish_reason": pa.string()}
    | {name: pa.int64() for name in ("image_tokens", "prompt_tokens", "caption_tokens", "seed")}
)


@dataclass(frozen=True)
class Pool:
    """Actors of a stage: how many, and what each takes."""

    min_size: int = 1
    max_size: int = 1
    num_cpus: float = 1.0
    num_gpus: float = 0.0

    def __post_init__(self) -> None:
        if not 1 <= self.min_size <= self.max_size:
            raise RunError(f"a pool has {self.min_size} to {self.max_size} actors; expected 1 or more, in order")
        if min(self.num_cpus, self.num_gpus) < 0:
            raise RunError(f"an actor takes {self.num_cpus:g} CPUs and {self.num_gpus:g} GPUs; expected 0 or more")


@dataclass(frozen=True, kw_only=True)
class CaptionConfig:
    """A captioning job. Every field is a flag of `jobs/caption.py`."""

    model: str
    """A3 folder, s3:// URI or hub id."""
    input: str
    """WebDataset shards, parquet or a saved dataset with an image or URL column, or plain image files; folder, glob,
    s3:// or hf:// URI, or hub dataset id."""
    output: str
    """Folder or s3:// URI. The same output continues the job; another model or prompt is refused."""
    prompt: str = "Describe this image in detail."
    """What the user says beside each image."""
    max_tokens: int = 256
    """Longer captions are cut, with the finish reason "length"."""
    format: FORMAT = "parquet"
    """`parquet`: captions by key; `webdataset`: the input with `.caption.txt` and `.caption.json`, which trains as it is."""
    temperature: float = 0.0
    """0 takes the most likely tokens."""
    seed: int = 0
    """With a temperature: the same seed draws the same captions."""
    max_pixels: int | None = None
    """Larger images are reduced to this area, in pixels; unless given, to the checkpoint's own."""
    dtype: str = "auto"
    """Of all computing: bfloat16, float32, or auto, which is bfloat16 except on CPUs without it."""
    device: str = "cpu"
    """Of encoder and engine: cpu or cuda."""
    part_rows: int = 2000
    """Rows of an output file; what a kill costs at most, beside what was on its way."""
    engine_kind: EngineKind = "auto"
    """transformers, vllm, or auto: vllm on a GPU where it is installed."""
    slots: int = 8
    """Captions that an engine writes at once."""
    quantization: Literal["none", "fp8"] = "none"
    """fp8 computes the decoder's linear layers in 8 bits (vllm)."""
    gpu_memory: float = 0.85
    """Share of the card that vllm takes for the decoder's weights and cache; the encoder needs room beside it."""
    threads: int = 0
    """CPU threads of each encoder and engine without a GPU; 0: the machine's cores."""
    decode: Pool = field(default_factory=lambda: Pool(max_size=2))
    encode: Pool = field(default_factory=Pool)
    engine: Pool = field(default_factory=Pool)
    fetch: FetchConfig = field(default_factory=FetchConfig)
    """For a URL column."""

    def __post_init__(self) -> None:
        for name in ("max_tokens", "part_rows", "slots"):
            if getattr(self, name) < 1:
                raise RunError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.dtype not in ("bfloat16", "float32", "auto"):
            raise RunError(f"dtype is {self.dtype}; expected bfloat16, float32 or auto")
        if self.format not in SUFFIXES:
            raise RunError(f"format is {self.format}; expected {' or '.join(SUFFIXES)}")
        if self.threads < 0:
            raise RunError(f"threads is {self.threads}; expected at least 1, or 0 for the machine's cores")
        SamplingParams(self.max_tokens, self.temperature)
        EngineConfig(kind=self.engine_kind, slots=self.slots, quantization=self.quantization, gpu_memory=self.gpu_memory)


@dataclass(frozen=True, slots=True)
class Work:
    """What of a shard is to be done: its rank among all, and the parts that are there."""

    rank: int
    shard: PictureShard
    skip: frozenset[int]


@dataclass(frozen=True, slots=True)
class Job:
    """All that the stages must know, and little to send around.

    model: for `fetch_model` on any node, pinned
    dtype: resolved
    """

    config: CaptionConfig
    model: str
    dtype: str
    work: Sequence[Work]

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def in_flight(self) -> int:
        """Rows that each engine has."""
        return IN_FLIGHT * self.config.slots

    def folder(self) -> Path:
        return fetch_model(self.model).path

    def spec(self, folder: Path) -> ImageSpec:
        return image_spec(self.config, folder)


def image_spec(config: CaptionConfig, folder: Path) -> ImageSpec:
    """The checkpoint's, with the configuration's limit.

    Raises:
        RunError: the limit does not fit the checkpoint.
    """
    spec = ImageSpec.load(folder)
    try:
        return spec.with_limits(None, config.max_pixels)
    except ValueError as error:
        raise RunError(f"{error}; give more, or leave it to the checkpoint") from error


def read_blocks(work: Work, part_rows: int, output_format: FORMAT) -> Iterator[pa.Table]:
    """The rows of a shard that are still to be done, in blocks of bounded size.

    A shard that cannot be read is one row that says why, with the number -1; an empty one a row without a reason.
    """
    return in_blocks(_raw_rows(work, part_rows, output_format), RAW, BLOCK_BYTES, BLOCK_BYTES // FETCH_ROWS)


def _raw_rows(work: Work, part_rows: int, output_format: FORMAT) -> Iterator[Row]:
    try:
        with open_pictures(work.shard) as pictures:
            rows = len(pictures)
            if not rows:
                yield work.rank, -1, 0, "", None, None, None, None
            wanted = [row for row in range(rows) if row // part_rows not in work.skip]
            for row, picture in zip(wanted, pictures.read(wanted)):
                files = None
                if output_format == "webdataset" and picture.files:
                    ours = ("caption.txt", "caption.json")
                    files = tar_members(picture.key, {e: d for e, d in picture.files.items() if e not in ours})
                yield work.rank, row, rows, picture.key, picture.error or None, files, picture.image, picture.url or None
    except RunError as error:
        yield work.rank, -1, -1, "", str(error), None, None, None


class Decode:
    """Image files to patches, those from URLs fetched; rows leave by size, so that batches hold images alike.

    However many rows a block has, few are in memory: Ray joins blocks of URLs to some 40,000 rows.
    """

    def __init__(self, job: Job) -> None:
        self.config, self.spec = job.config, job.spec(job.folder())

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        rows = table.to_pylist()
        for at in range(0, len(rows), FETCH_ROWS):
            for held in by_bytes(self._rows(rows[at : at + FETCH_ROWS]), _patch_bytes, SORTED_BYTES):
                held.sort(key=lambda row: row[7] * row[8])
                for first in range(0, len(held), ENCODE_ROWS):
                    yield from in_blocks(held[first : first + ENCODE_ROWS], DECODED, BLOCK_BYTES)

    def _rows(self, rows: Sequence[dict[str, Any]]) -> Iterator[Row]:
        fetched = fetch_all(self.config.fetch, [row["url"] for row in rows if row["url"]])
        for row in rows:
            yield self._row(row, fetched.get(row["url"], row["image"]))

    def _row(self, row: dict[str, Any], image: bytes | SampleError) -> Row:
        place = row["shard"], row["row"], row["rows"], row["key"]
        files = row["files"]
        try:
            if row["error"] is not None or row["row"] < 0:
                return *place, row["error"], files, "", 0, 0, None
            if isinstance(image, SampleError):
                raise image
            if self.config.format == "webdataset" and not files:
                files = tar_members(f"{row['row']:08d}", {image_extension(image): image})
            patches = patchify(decode_image(image), self.spec)
        except SampleError as error:
            return *place, str(error), files, "", 0, 0, None
        return *place, None, files, engines.image_key(image), *patches.grid, patches.pixels


def fetch_all(config: FetchConfig, urls: Sequence[str]) -> dict[str, bytes | SampleError]:
    """What is behind each URL, or why nothing is."""

    async def gather(unique: Sequence[str]) -> dict[str, bytes | SampleError]:
        fetcher = Fetcher(config)  # its turns belong to one event loop

        async def fetch(url: str) -> bytes | SampleError:
            try:
                return await fetcher.fetch(url)
            except SampleError as error:
                return error

        return dict(zip(unique, await asyncio.gather(*map(fetch, unique))))

    return asyncio.run(gather(list(dict.fromkeys(urls)))) if urls else {}


def _patch_bytes(decoded: Row) -> int:
    return 0 if decoded[-1] is None else decoded[-1].nbytes


class Encode:
    """Patches to embeddings."""

    def __init__(self, job: Job) -> None:
        set_threads(job.config)
        folder = job.folder()
        self.encoder = ImageEncoder.load(folder, job.torch_dtype, job.config.device, spec=job.spec(folder))

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        return in_blocks(self._rows(table), EMBEDDED, BLOCK_BYTES)

    def _rows(self, table: pa.Table) -> Iterator[Row]:
        rows = table.drop_columns(["patches"]).to_pylist()
        pixels = whole(table["patches"])
        wanted = [i for i, row in enumerate(rows) if row["image_key"]]
        images = []
        for i in wanted:
            grid = rows[i]["grid_h"], rows[i]["grid_w"]
            flat = np.frombuffer(pixels[i].as_buffer(), np.uint8)
            images.append((rows[i]["image_key"], Patches(flat.reshape(grid[0] * grid[1], -1), grid)))
        embedded = dict(zip(wanted, self.encoder.encode(images)))
        for i, row in enumerate(rows):
            bits = embedded[i].embeds.contiguous().view(torch.uint8).numpy().reshape(-1) if i in embedded else None
            yield *row.values(), bits


class Caption:
    """Embeddings to captions: an engine that many calls share, so that it always has more requests than slots."""

    def __init__(self, job: Job) -> None:
        set_threads(job.config)
        folder = job.folder()
        config = graft.load_config(folder)
        tokenizer = graft.load_tokenizer(folder)
        thinking = chat.image_thinking(True, config.image_turn_thinking)
        self.config, self.dtype, self.hidden = job.config, job.torch_dtype, config.text_config.hidden_size
        self.frame = chat.CaptionFrame.build(tokenizer, job.config.prompt, thinking)
        self.thinks = thinking is not False
        bounds = engine_config(job.config, job.spec(folder), self.frame)
        self.engine = engines.load_engine(folder, bounds, self.dtype, job.config.device)
        self._numbers = itertools.count()

    async def __call__(self, table: pa.Table) -> pa.Table:
        rows = table.drop_columns(["embeds"]).to_pylist()
        if not rows:
            return CAPTIONED.empty_table()
        bits = whole(table["embeds"])
        answers = await asyncio.gather(*(self._row(row, bits[i].as_buffer()) for i, row in enumerate(rows)))
        (block,) = in_blocks(answers, CAPTIONED, 1 << 62)
        return block

    async def _row(self, row: dict[str, Any], bits: Any) -> Row:
        place = row["shard"], row["row"], row["rows"], row["key"]
        if not row["image_key"]:
            return *place, row["error"], row["files"], None, None, 0, 0, 0, 0
        flat = torch.from_numpy(np.frombuffer(bits, np.uint8).copy()).view(self.dtype)
        image = ImageEmbedding(row["image_key"], flat.view(-1, self.hidden), (row["grid_h"], row["grid_w"]))
        prompt = self.frame.prompt(len(image.embeds))
        seed = self._seed(row)
        sampling = SamplingParams(
            self.config.max_tokens, self.config.temperature, seed=seed, skip_special_tokens=not self.thinks
        )
        request = engines.Request(f"row-{next(self._numbers)}", tuple(prompt), sampling, (image,))
        try:
            done = await engines.complete(self.engine, request)
        except SampleError as error:
            return *place, str(error), row["files"], None, None, len(image.embeds), len(prompt), 0, seed
        text = done.text.rpartition("</think>")[2] if self.thinks else done.text
        counts = len(image.embeds), len(prompt), len(done.token_ids)
        return *place, None, row["files"], text.strip(), done.finish_reason, *counts, seed

    def _seed(self, row: dict[str, Any]) -> int:
        """Of a row, whatever it is computed together with."""
        if self.config.temperature == 0:
            return self.config.seed
        digest = hashlib.sha256(f"{self.config.seed}/{row['shard']}/{row['row']}".encode()).digest()
        return int.from_bytes(digest[:8], "big") >> 1


def engine_config(config: CaptionConfig, spec: ImageSpec, frame: chat.CaptionFrame) -> EngineConfig:
    """Slots as long as the largest image's prompt and the longest caption."""
    return EngineConfig(
        slots=config.slots,
        max_length=len(frame.prompt(most_image_tokens(spec))) + config.max_tokens,
        kind=config.engine_kind,
        quantization=config.quantization,
        gpu_memory=config.gpu_memory,
    )


def most_image_tokens(spec: ImageSpec) -> int:
    """Of any image: a narrow one may have more than `max_pixels` would hold."""
    return spec.max_patches // spec.merge_size**2


def set_threads(config: CaptionConfig) -> None:
    """Ray gives an actor as many threads as it has logical CPUs, which fits no stage here."""
    torch.set_num_threads(config.threads or os.cpu_count() or 1)
