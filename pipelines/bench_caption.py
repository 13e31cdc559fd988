"""What captioning costs: images/s of the pipeline, of its own parts in one process, and of `generate` one by one.

`in_process` is the pipeline without Ray: the same stages, called by one program. It is the reference for the cost of
Ray, and for the content of an output.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import torch

from artemis_vlm import chat, graft
from artemis_vlm.errors import RunError
from artemis_vlm.image import decode_image, patchify
from artemis_vlm.modeling import ArtemisVLMForConditionalGeneration, normalize
from pipelines import caption, caption_stages
from pipelines.caption_stages import CaptionConfig, Job
from pipelines.local import join_or_start
from pipelines.machine import machine
from pipelines.parts import CaptionRow
from pipelines.pictures import find_pictures, image_extension, open_pictures


def in_process(config: CaptionConfig) -> dict[str, Any]:
    """`caption.run` in this process, without Ray; returns the manifest."""
    output, job = caption.prepare(config)
    caption.collect(job, output, tables(job))
    return output.finish()


def tables(job: Job) -> Iterator[pa.Table]:
    """Captioned rows; the tower runs while the engine decodes, and the engine always has more requests than slots."""
    decode, encode, engine = caption_stages.Decode(job), caption_stages.Encode(job), caption_stages.Caption(job)
    blocks = _embedded(job, decode, encode)
    loop = asyncio.new_event_loop()
    running: deque[tuple[int, asyncio.Task[pa.Table]]] = deque()

    async def start_more() -> None:
        while sum(rows for rows, task in running if not task.done()) < job.in_flight:
            block = await asyncio.to_thread(next, blocks, None)
            if block is None:
                return
            running.append((block.num_rows, loop.create_task(engine(block))))

    async def oldest() -> pa.Table:
        return await running.popleft()[1]

    try:
        loop.run_until_complete(start_more())
        while running:
            yield loop.run_until_complete(oldest())
            loop.run_until_complete(start_more())
    finally:
        tasks = [task for _, task in running]
        for task in tasks:
            task.cancel()
        if tasks:
            loop.run_until_complete(asyncio.wait(tasks))
        engine.engine.close()
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()


def _embedded(job: Job, decode: caption_stages.Decode, encode: caption_stages.Encode) -> Iterator[pa.Table]:
    for work in job.work:
        for raw in caption_stages.read_blocks(work, job.config.part_rows, job.config.format):
            for decoded in decode(raw):
                yield from encode(decoded)


# --- the reference ---------------------------------------------------------------------------------------------------


class PlainLoop:
    """Transformers' own `generate`, one image at a time: what a script without this project does."""

    def __init__(self, job: Job) -> None:
        caption_stages.set_threads(job.config)
        folder = job.folder()
        self.job, self.spec, self.tokenizer = job, job.spec(folder), graft.load_tokenizer(folder)
        self.model = ArtemisVLMForConditionalGeneration.from_pretrained(folder, dtype=job.torch_dtype).eval()
        self.model.to(job.config.device)
        thinking = chat.image_thinking(True, self.model.config.image_turn_thinking)
        self.frame = chat.CaptionFrame.build(self.tokenizer, job.config.prompt, thinking)

    @torch.inference_mode()
    def caption(self, image: bytes) -> str:
        patches = patchify(decode_image(image), self.spec)
        ids = torch.tensor([self.frame.prompt(self.spec.tokens(patches.grid))], device=self.job.config.device)
        out = self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=normalize(torch.from_numpy(patches.pixels), self.spec).to(ids.device, self.job.torch_dtype),
            image_grid_thw=torch.tensor([[1, *patches.grid]], device=ids.device),
            max_new_tokens=self.job.config.max_tokens,
            do_sample=False,
            pad_token_id=0,
        )
        return str(self.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)).strip()


@dataclass(frozen=True, kw_only=True)
class CaptionBench:
    """Images/s of captioning beside what it could cost. Run it where nothing else runs."""

    model: str
    """A3 folder, s3:// URI or hub id."""
    input: str
    """Images, as for `jobs/caption.py`."""
    images: int = 64
    """How many of them; a tenth of them, 4 at least, goes through the plain loop."""
    max_tokens: int = 96
    slots: int = 8
    dtype: str = "auto"
    device: str = "cpu"
    threads: int = 0


def run(bench: CaptionBench) -> dict[str, Any]:
    """Measures in turn: `generate` one by one, the stages without Ray, and the pipeline; prints and returns the figures.

    The last two run twice, on a quarter of the images and on all. The rate is of what lies between: neither the loading
    of models nor the filling and draining of the pipeline is in it.
    """
    with TemporaryDirectory(prefix="artemis-bench-") as folder:
        images = _images(bench, Path(folder) / "all")
        few = images[: max(1, len(images) // 4)]
        _write(few, Path(folder) / "few")
        names = ("model", "max_tokens", "slots", "dtype", "device", "threads")
        fields = {name: getattr(bench, name) for name in names}
        config = CaptionConfig(**fields, input=f"{folder}/all", output=f"{folder}/plain", part_rows=64)
        _, job = caption.prepare(config)
        figures: dict[str, Any] = machine(bench.device, dtype=job.dtype) | {"images": len(images)}
        alone, plain = _plain(job, images[: max(4, len(images) // 10)])

        def rate(stages: Any, name: str) -> float:
            part = replace(config, input=f"{folder}/few", output=f"{folder}/{name}-few")
            seconds = [_seconds(part, stages), _seconds(replace(config, output=f"{folder}/{name}"), stages)]
            figures[f"{name}, s for {len(few)} and {len(images)}"] = [round(s, 1) for s in seconds]
            return (len(images) - len(few)) / (seconds[1] - seconds[0])

        here = rate(tables, "without Ray")
        join_or_start()
        there = rate(caption.tables, "pipeline")
        figures["generate one by one, images/s"] = round(plain, 3)
        figures["without Ray, images/s"], figures["of one by one"] = round(here, 3), round(here / plain, 2)
        figures["pipeline, images/s"], figures["of without Ray"] = round(there, 3), round(there / here, 3)
        rows, ray_rows = (
            [row for row, _ in _rows(replace(config, output=f"{folder}/{name}"))] for name in ("without Ray", "pipeline")
        )
        figures["captions that differ from generate's"] = sum(a != r.caption for a, r in zip(alone, rows))
        figures["captions that differ with Ray"] = sum(a.caption != b.caption for a, b in zip(rows, ray_rows, strict=True))
        figures["tokens a caption"] = round(sum(r.caption_tokens for r in rows) / max(1, len(rows)), 1)
    print(json.dumps(figures, indent=1))
    return figures


def _images(bench: CaptionBench, folder: Path) -> list[bytes]:
    """The first readable ones, also as plain files."""
    found: list[bytes] = []
    for shard in find_pictures(bench.input, bench.images):
        with open_pictures(shard) as pictures:
            for picture in pictures.read(range(min(len(pictures), bench.images - len(found)))):
                if picture.image and not picture.error:
                    found.append(picture.image)
    if not found:
        raise RunError(f"the data {bench.input} has no image to measure with")
    _write(found, folder)
    return found


def _write(images: list[bytes], folder: Path) -> None:
    folder.mkdir()
    for number, image in enumerate(images):
        (folder / f"{number:06d}.{image_extension(image)}").write_bytes(image)


def _plain(job: Job, images: list[bytes]) -> tuple[list[str | None], float]:
    loop = PlainLoop(job)
    loop.caption(images[0])  # what only the first call does
    started = time.perf_counter()
    captions: list[str | None] = [loop.caption(image) for image in images]
    return captions, len(images) / (time.perf_counter() - started)


def _seconds(config: CaptionConfig, stages: Any) -> float:
    """From the configuration to the end of the output."""
    started = time.perf_counter()
    output, job = caption.prepare(config)
    caption.collect(job, output, stages(job))
    output.finish()
    return time.perf_counter() - started


def _rows(config: CaptionConfig) -> Iterator[tuple[CaptionRow, bytes]]:
    output, _ = caption.prepare(config)
    for part in sorted(output.notes):
        yield from output.rows(part)
