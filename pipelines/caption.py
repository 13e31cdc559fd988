"""Large-scale offline captioning: shards of images in, one caption or one error for every row out.

    read_blocks ─► Decode (CPU) ─► Encode (tower, projector) ─► Caption (engine) ─► this process: parts.Collector
      read tasks      actor pool         actor pool                 actor pool           writes parts, then `_SUCCESS`

Ray Data streams between pools that are sized each on its own, in bounded memory. Only the driver writes, and a part is
there whole or not at all, so resuming is to leave out the rows of parts that are there: simpler than Ray Data's
checkpoint of row ids, which needs the writes inside its plan, commits blocks of whatever size its stages make, and
knows neither which run an output belongs to nor when it is complete.

The stages themselves are `pipelines.caption_stages`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import ray
import ray.data
from ray.data import ActorPoolStrategy, DataContext, ExecutionResources

from artemis_vlm import graft, tensorfile
from artemis_vlm.engines import engine_kind
from artemis_vlm.errors import ArtemisError, RunError
from artemis_vlm.frozen import compute_dtype
from artemis_vlm.image import PREPROCESSOR_FILE
from artemis_vlm.tensorfile import Held
from pipelines.caption_stages import (
    BLOCK_BYTES,
    ENCODE_ROWS,
    SUFFIXES,
    Caption,
    CaptionConfig,
    Decode,
    Encode,
    Job,
    Pool,
    Work,
    fetch_all,
    image_spec,
    most_image_tokens,
    read_blocks,
)
from pipelines.feed import ShardSource
from pipelines.local import is_alone, join_or_start
from pipelines.machine import check_device
from pipelines.parts import CaptionRow, Collector, Layout, Output
from pipelines.pictures import PictureShard, as_text, find_pictures, open_pictures
from pipelines.report import CaptionSample, captions_page, duration
from pipelines.shards import Shard
from pipelines.shards import identity as data_identity
from pipelines.storage import ModelFolder, fetch_model, is_inside, is_remote, local_path

logger = logging.getLogger(__name__)

#: Images waiting between the stages, in bytes, beside the embeddings that engines hold.
AHEAD_BYTES: Final = 1 << 30
#: Images in one call of an engine's actor.
ENGINE_ROWS: Final = 16
#: Seconds between lines of progress.
PROGRESS_S: Final = 5.0
PAGE_FILE: Final = "_report.html"
PAGE_SAMPLES: Final = 12


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
        ArtemisError: inputs, model or what should compute are not there, or the output cannot be written, is another run's
            or within the input.
    """
    if is_inside(config.output, config.input):  # what is written would be input when the job continues
        raise RunError(f"the output {config.output} lies inside the input {config.input}; choose a folder beside it")
    check_device(config.device, here=is_alone())
    if config.engine_kind == "vllm" and is_alone() and engine_kind("auto", "cuda") != "vllm":
        raise RunError("the engine is vllm, which is not installed here; pip install 'artemis-vlm[vllm]'")
    model = fetch_model(config.model)
    image_spec(config, model.path)
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
    files = [Shard("\n".join((s.name, *map(as_text, s.files))), s.uri) for s in shards]
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
        ShardSource([partial(read_blocks, work, config.part_rows, config.format) for work in job.work]),
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
    embedding: int = most_image_tokens(spec) * hidden * job.torch_dtype.itemsize
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
                    progress.known[row["shard"]] = 0
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
        if not self.done or (now - self.told < PROGRESS_S and not last):
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
    """A page with some rows of one part, images and captions, beside the output; the input may be gone by then."""
    assert output.run is not None
    part = min(output.notes)
    rows = [row for row, _ in output.rows(part)]
    shown = sorted({round(i * (len(rows) - 1) / (PAGE_SAMPLES - 1)) for i in range(PAGE_SAMPLES)}) if rows else []
    rows = [rows[i] for i in shown]
    try:
        images = _images(config, rows) if rows else []
    except RunError as error:
        logger.warning("%s shows no images: %s", PAGE_FILE, error)
        images = [b""] * len(rows)
    samples = []
    for row, image in zip(rows, images):
        what = f"{row.shard} {row.key}"
        samples.append(CaptionSample(image, row.caption, what if row.error is None else f"{what}: {row.error}"))
    done = sum(note.rows for note in output.notes.values())
    failed = Counter[str]()
    for note in output.notes.values():
        failed.update(note.failed)
    where = f"{config.model.rstrip('/').rpartition('/')[2]}, {output.run['dtype']}: {config.prompt}"
    output.store.write(PAGE_FILE, captions_page(f"{done} images captioned", where, samples, failed.most_common(20)))


def _images(config: CaptionConfig, rows: Sequence[CaptionRow]) -> list[bytes]:
    """The image files of some rows of one shard, read or fetched again; empty where that fails.

    Raises:
        RunError: the shard is not there any more, cannot be read, or is another.
    """
    shard = next((s for s in find_pictures(config.input, config.part_rows) if s.name == rows[0].shard), None)
    if shard is None:
        raise RunError(f"the shard {rows[0].shard} is gone")
    with open_pictures(shard) as pictures:
        if rows[-1].row >= len(pictures):
            raise RunError(f"the shard {shard.name} now has {len(pictures)} rows")
        found = list(pictures.read([row.row for row in rows]))
    fetched = fetch_all(config.fetch, [picture.url for picture in found if picture.url])
    images = [fetched.get(picture.url, picture.image) for picture in found]
    return [image if isinstance(image, bytes) else b"" for image in images]
