"""Large-scale offline captioning: shards of images in, one caption or one error for every row out.

    PictureSource ─► Decode (CPU) ─► Encode (tower, projector) ─► Caption (engine) ─► this process: parts.Collector
      read tasks      actor pool         actor pool                 actor pool           writes parts, then `_SUCCESS`

Ray Data streams between pools that are sized each on its own, in bounded memory. Only the driver writes, and a part is
there whole or not at all, so resuming is to leave out the rows of parts that are there: simpler than Ray Data's
checkpoint of row ids, which needs the writes inside its plan, commits blocks of whatever size its stages make, and
knows neither which run an output belongs to nor when it is complete.

Pixels, prompts, encoder and engine are those of training and serving.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import itertools
import json
import logging
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import pyarrow as pa
import ray
import ray.data
import torch
from ray.data import ActorPoolStrategy, DataContext, Datasource, ExecutionResources, ReadTask
from ray.data.block import BlockMetadata

from artemis_vlm import chat, engines, graft, tensorfile
from artemis_vlm.engines import EngineConfig, EngineKind, ImageEmbedding, ImageEncoder, SamplingParams
from artemis_vlm.errors import ArtemisError, RunError, SampleError
from artemis_vlm.frozen import compute_dtype
from artemis_vlm.image import PREPROCESSOR_FILE, ImageSpec, Patches, decode_image, patchify
from artemis_vlm.tensorfile import Held
from pipelines.feed import in_blocks, whole
from pipelines.fetch import FetchConfig, Fetcher
from pipelines.local import join_or_start
from pipelines.parts import CaptionRow, Collector, Layout, Output, tar_members
from pipelines.pictures import PictureShard, find_pictures, image_extension, open_pictures
from pipelines.report import CaptionSample, captions_page, duration
from pipelines.shards import Shard
from pipelines.shards import identity as data_identity
from pipelines.storage import ModelFolder, fetch_model, is_remote, local_path

logger = logging.getLogger(__name__)

Row = tuple[Any, ...]

#: Of blocks between the stages.
BLOCK_BYTES: Final = 4 << 20
#: Images waiting between the stages, in bytes, beside the embeddings that engines hold.
AHEAD_BYTES: Final = 1 << 30
#: Images in one call of the tower, and of one call of an engine's actor.
ENCODE_ROWS: Final = 16
ENGINE_ROWS: Final = 16
#: Requests that an engine has at least, as a multiple of its slots: what finishes is followed at once.
IN_FLIGHT: Final = 3
#: Seconds between lines of progress.
PROGRESS_S: Final = 5.0
PAGE_FILE: Final = "_report.html"
PAGE_SAMPLES: Final = 12
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
        SamplingParams(self.max_tokens, self.temperature)


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
        return ImageSpec.load(folder).with_limits(None, self.config.max_pixels)


# --- the stages ------------------------------------------------------------------------------------------------------


class PictureSource(Datasource):  # type: ignore[misc]
    """Shards, a read task each; a shard is opened when its task runs."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        self.job = job

    def get_name(self) -> str:
        return "Shards"

    def estimate_inmemory_data_size(self) -> int | None:
        return None  # only reading would tell

    def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
        unknown = BlockMetadata(num_rows=None, size_bytes=None, exec_stats=None)
        config = self.job.config
        return [ReadTask(partial(read_blocks, work, config.part_rows, config.format), unknown) for work in self.job.work]


def read_blocks(work: Work, part_rows: int, output_format: FORMAT) -> Iterator[pa.Table]:
    """The rows of a shard that are still to be done, in blocks of bounded size.

    A shard that cannot be read is one row that says why, with the number -1; an empty one a row without a reason.
    """
    return in_blocks(_raw_rows(work, part_rows, output_format), RAW, BLOCK_BYTES)


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
    """Image files to patches, those from URLs fetched; rows leave by size, so that batches hold images alike."""

    def __init__(self, job: Job) -> None:
        self.config, self.spec = job.config, job.spec(job.folder())

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        rows = table.to_pylist()
        fetched = asyncio.run(self._fetch([row["url"] for row in rows if row["url"]]))
        decoded = [self._row(row, fetched.get(row["url"], row["image"])) for row in rows]
        decoded.sort(key=lambda row: row[7] * row[8])
        for at in range(0, len(decoded), ENCODE_ROWS):
            yield from in_blocks(decoded[at : at + ENCODE_ROWS], DECODED, BLOCK_BYTES)

    async def _fetch(self, urls: Sequence[str]) -> dict[str, bytes | SampleError]:
        if not urls:
            return {}
        fetcher = Fetcher(self.config.fetch)  # its turns belong to one event loop

        async def fetch(url: str) -> bytes | SampleError:
            try:
                return await fetcher.fetch(url)
            except SampleError as error:
                return error

        unique = list(dict.fromkeys(urls))
        return dict(zip(unique, await asyncio.gather(*map(fetch, unique))))

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
    image_tokens = spec.max_pixels // spec.factor**2
    return EngineConfig(
        slots=config.slots,
        max_length=len(frame.prompt(image_tokens)) + config.max_tokens,
        kind=config.engine_kind,
        quantization=config.quantization,
        gpu_memory=config.gpu_memory,
    )


def set_threads(config: CaptionConfig) -> None:
    """Ray gives an actor as many threads as it has logical CPUs, which fits no stage here."""
    torch.set_num_threads(config.threads or os.cpu_count() or 1)


# --- the run ---------------------------------------------------------------------------------------------------------


def run(config: CaptionConfig) -> dict[str, Any]:
    """Captions whatever is not captioned yet; returns the manifest.

    Raises:
        ArtemisError: inputs, model or output do not fit, or a shard could not be read; all else is done by then.
    """
    output, job = prepare(config)
    if output.complete:
        manifest = output.finish()
        print(f"{config.output} is complete: {manifest['rows']} rows, {manifest['failed']} without a caption")
        return manifest
    if job.work:
        join_or_start()
        collect(job, output, tables(job))
    write_page(config, output)
    manifest = output.finish()
    print(
        f"{manifest['rows']} rows, {manifest['failed']} without a caption, {manifest['caption_tokens']} tokens, "
        f"sha256 {manifest['sha256'][:16]}\ncaptions    {config.output}\nsamples     {config.output.rstrip('/')}/{PAGE_FILE}"
    )
    return manifest


def prepare(config: CaptionConfig) -> tuple[Output, Job]:
    """The output, claimed for this run, and what is left to do.

    Raises:
        ArtemisError: inputs or model are not there, or the output is another run's.
    """
    model = fetch_model(config.model)
    shards = find_pictures(config.input, config.part_rows)
    output = Output(config.output, Layout([s.name for s in shards], SUFFIXES[config.format], config.part_rows))
    dtype = config.dtype
    if dtype == "auto":
        # what decides bits is the run's, on whatever machine it continues
        default = str(compute_dtype(config.device)).removeprefix("torch.")
        dtype = output.run["dtype"] if output.run else default
    output.claim(run_identity(config, model, shards, dtype))
    work = [
        Work(rank, shard, frozenset(parts))
        for rank, (shard, (parts, of)) in enumerate(zip(shards, output.done()))
        if not of or len(parts) < of
    ]
    pinned = model.origin if is_remote(model.origin) else str(local_path(config.model))
    return output, Job(config, pinned, dtype, work)


def run_identity(config: CaptionConfig, model: ModelFolder, shards: Sequence[PictureShard], dtype: str) -> dict[str, Any]:
    """What must be the same for an output to be continued: all that decides its rows."""
    files = [Shard(s.name if not s.files else "\n".join((s.name, *s.files)), s.uri) for s in shards]
    same = ("prompt", "max_tokens", "temperature", "seed", "max_pixels", "format", "part_rows")
    quantized = {} if config.quantization == "none" else {"quantization": config.quantization}
    return {
        "model": fingerprint(model.path),
        **{name: getattr(config, name) for name in same},
        **quantized,
        "dtype": dtype,
        "input": data_identity(files),
    }


def fingerprint(folder: Path) -> dict[str, str]:
    """sha256 of a model's projector, of its manifest (which has those of its frozen tensors), and of its other files."""
    projector = {name: tensorfile.digest(Held(t)) for name, t in sorted(graft.read_projector(folder).items())}
    if (folder / graft.MANIFEST_FILE).exists():
        frozen = (folder / graft.MANIFEST_FILE).read_bytes()
    else:  # not grafted here: the tensors themselves
        stored = sorted(graft.stored_tensors(folder).items())
        frozen = repr([(name, tensorfile.digest(t)) for name, t in stored]).encode()
    small = sorted({"config.json", PREPROCESSOR_FILE, *graft.TEXT_FILES})
    files = [(name, (folder / name).read_bytes()) for name in small if (folder / name).exists()]
    parts = {"projector": repr(projector).encode(), "frozen": frozen, "files": repr(files).encode()}
    return {name: hashlib.sha256(data).hexdigest() for name, data in parts.items()}


def model_name(identity: dict[str, Any]) -> str:
    """A fingerprint as one word, for the rows."""
    return hashlib.sha256(json.dumps(identity["model"], sort_keys=True).encode()).hexdigest()


def tables(job: Job) -> Iterator[pa.Table]:
    """Captioned rows as the cluster gets them done.

    Raises:
        RunError: a stage cannot go on.
    """
    try:
        yield from plan(job).iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1)
    except ray.exceptions.RayError as error:
        raise _told(error) from error


def _told(error: BaseException) -> RunError:
    """The sentence of the ArtemisError behind what Ray says."""
    seen: list[BaseException] = []
    cause: Any = error
    while isinstance(cause, BaseException) and cause not in seen:
        if isinstance(cause, ArtemisError) and not isinstance(cause, ray.exceptions.RayError):  # Ray's copy has a traceback
            return RunError(str(cause))
        seen.append(cause)
        cause = getattr(cause, "cause", None) or cause.__cause__
    logger.error("a stage failed", exc_info=error)
    last = str(error).strip().splitlines()[-1:]
    return RunError(f"captioning stopped: {''.join(last)}; what is done stays, run the same command to continue")


def plan(job: Job) -> ray.data.Dataset:
    """The stages on Ray Data."""
    config = job.config
    _hush_ray_data()
    context = DataContext.get_current()
    context.execution_options.resource_limits = ExecutionResources.for_limits(object_store_memory=_ahead_bytes(job))
    context.target_max_block_size = BLOCK_BYTES
    context.enable_progress_bars = False
    share = _cpu_share(config)
    rows = min(ENGINE_ROWS, config.slots)
    readers = min(len(job.work), max(1, config.engine.max_size // 2))
    dataset = ray.data.read_datasource(
        PictureSource(job),
        concurrency=readers,
        override_num_blocks=len(job.work),
        num_cpus=0,  # it mostly waits
    )

    def stage(dataset: ray.data.Dataset, cls: type, pool: Pool, batch_size: int | None, calls: int = 1) -> ray.data.Dataset:
        return dataset.map_batches(
            cls,
            fn_constructor_args=(dataclasses.replace(job, work=()),),  # a stage needs no list of all files
            batch_size=batch_size,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(min_size=pool.min_size, max_size=pool.max_size, max_concurrent_calls_per_actor=calls),
            num_cpus=pool.num_cpus * share,
            num_gpus=pool.num_gpus or None,
            zero_copy_batch=True,
        )

    dataset = stage(dataset, Decode, config.decode, None)
    dataset = stage(dataset, Encode, config.encode, ENCODE_ROWS)
    return stage(dataset, Caption, config.engine, rows, -(-job.in_flight // rows))


def _cpu_share(config: CaptionConfig) -> float:
    """1, or 0 where the stages ask for more logical CPUs than there are, and would wait for them for ever."""
    pools = (config.decode, config.encode, config.engine)
    wanted = sum(pool.min_size * pool.num_cpus for pool in pools)
    there = float(ray.cluster_resources().get("CPU", 0))
    if wanted <= there:
        return 1
    logger.warning("the stages ask for %g logical CPUs, the cluster has %g: they share them", wanted, there)
    return 0


def _ahead_bytes(job: Job) -> int:
    """Between all stages: images, and the embeddings that the engines have before them."""
    folder = job.folder()
    spec, hidden = job.spec(folder), graft.load_config(folder).text_config.hidden_size
    embedding: int = spec.max_pixels // spec.factor**2 * hidden * job.torch_dtype.itemsize
    return job.config.engine.max_size * (AHEAD_BYTES + 2 * job.in_flight * min(embedding, 16 << 20))


def _hush_ray_data() -> None:
    """Ray Data warns of every stage that waits for the next; all wait for the engine here, as they should.

    What it says of its plans would stand between the lines of progress.
    """
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    for name in ("execution.streaming_executor_state", "progress"):
        logging.getLogger(f"ray.data._internal.{name}").setLevel(logging.ERROR)


def collect(job: Job, output: Output, captioned: Iterator[pa.Table]) -> None:
    """Writes rows into parts as they come, and says how far it is.

    Raises:
        RunError: a part could not be written, or a shard not be read.
    """
    collector, progress = Collector(output), Progress(job, output)
    assert output.run is not None
    model, unread = model_name(output.run), dict[str, str]()
    for table in captioned:
        for row in table.to_pylist():
            shard = output.layout.shards[row["shard"]]
            if row["row"] < 0:
                if row["error"] is None:
                    collector.empty(row["shard"])
                else:
                    unread[shard] = row["error"]
                continue
            found = CaptionRow(
                key=row["key"],
                shard=shard,
                model=model,
                prompt=job.config.prompt,
                **{n: row[n] for n in ("row", "caption", "finish_reason", "seed", "error")},
                **{n: row[n] for n in ("image_tokens", "prompt_tokens", "caption_tokens")},
            )
            if collector.add(row["shard"], row["rows"], found, row["files"] or b""):
                progress.add(row["shard"], row["rows"], found.error is not None)
        progress.tell()
    collector.close()
    progress.tell(last=True)
    if unread:
        name, reason = next(iter(unread.items()))
        raise RunError(
            f"{len(unread)} of {len(output.layout.shards)} shards could not be read, {name} among them ({reason}); all else "
            "is captioned: mend them and run the same command again"
        )


class Progress:
    """Counts rows and says how many are done, how many failed, how fast, and how long it still takes."""

    def __init__(self, job: Job, output: Output) -> None:
        self.layout, self.skipped = output.layout, {work.rank: work.skip for work in job.work}
        notes = output.notes.values()
        self.before, self.failed = sum(n.rows for n in notes), sum(sum(n.failed.values()) for n in notes)
        #: Rows to do in each shard, where they are known.
        self.known: dict[int, int] = {}
        self.done = 0
        self.started = self.told = time.monotonic()

    def add(self, shard: int, rows: int, failed: bool) -> None:
        if shard not in self.known:
            sizes = self.layout.sizes(rows)
            self.known[shard] = sum(size for part, size in enumerate(sizes) if part not in self.skipped[shard])
        self.done += 1
        self.failed += failed

    def tell(self, last: bool = False) -> None:
        now = time.monotonic()
        if not self.known or (now - self.told < PROGRESS_S and not last):
            return
        self.told = now
        unopened = len(self.skipped) - len(self.known)  # they count as the mean of the others
        to_do = sum(self.known.values()) * (1 + unopened / len(self.known))
        rate = self.done / max(now - self.started, 1e-3)  # the loading of models counts too
        total = f"{'about ' if unopened else ''}{round(self.before + to_do)}"
        left = f"{duration((to_do - self.done) / rate)} left"
        print(f"{self.before + self.done} of {total} rows, {self.failed} failed, {rate:.1f} images/s, {left}", flush=True)


# --- the page --------------------------------------------------------------------------------------------------------


def write_page(config: CaptionConfig, output: Output) -> None:
    """A page with some rows of one part, images and captions, beside the output."""
    assert output.run is not None
    part = min(output.notes)
    rows = [row for row, _ in output.rows(part)]
    rows = (
        [rows[i] for i in sorted({round(i * (len(rows) - 1) / (PAGE_SAMPLES - 1)) for i in range(PAGE_SAMPLES)})]
        if rows
        else []
    )
    samples = []
    if rows:
        shard = next(s for s in find_pictures(config.input, config.part_rows) if s.name == rows[0].shard)
        with open_pictures(shard) as pictures:
            for row, picture in zip(rows, pictures.read([row.row for row in rows])):
                what = f"{row.shard} {row.key}"
                samples.append(
                    CaptionSample(picture.image, row.caption, what if row.error is None else f"{what}: {row.error}")
                )
    done = sum(note.rows for note in output.notes.values())
    failed = Counter[str]()
    for note in output.notes.values():
        failed.update(note.failed)
    where = f"{config.model.rstrip('/').rpartition('/')[2]}, {output.run['dtype']}: {config.prompt}"
    output.store.write(PAGE_FILE, captions_page(f"{done} images captioned", where, samples, failed.most_common(20)))
