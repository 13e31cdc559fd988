"""What one CPU core encodes: tar shards to patches and token ids, beside decoding alone and the usual ways.

All figures are of the CPU time of this process, which another program's load disturbs least, and the ways take turns
over the same images, so that what disturbs one disturbs all.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any, Final

import numpy as np
import ray
from PIL import Image
from transformers import PreTrainedTokenizerBase

from artemis_vlm.chat import CaptionFrame
from artemis_vlm.image import ImageSpec, decode_image, patchify, resized_size
from artemis_vlm.processing import image_processor_of
from pipelines.data import Encoder, Position, Turn
from pipelines.feed import BLOCK_BYTES, by_bytes
from pipelines.local import join_or_start
from pipelines.machine import machine
from pipelines.shards import RawSample, Shard, open_rows
from pipelines.storage import cache_folder

SPEC: Final = ImageSpec()
#: Name, size in pixels, bytes of the JPEG.
KINDS: Final = (("37 KB", (480, 360), 37_000), ("200 KB", (1024, 768), 200_000))
#: Of a pixel, beside the octaves: enough for the larger target, at a quality below 95.
NOISE: Final = 0.04
DISTINCT: Final = 8
ROUNDS: Final = 5
TEXT: Final = (
    "The image shows a quiet street lined with brick houses where several people walk past parked bicycles under a "
    "cloudy sky. In the foreground a red umbrella leans against a wooden bench, and behind it a small café with large "
    "windows reflects the afternoon light."
)


def run(images: int, json_file: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """Measures and prints; returns the exit code."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    about = machine("cpu")
    print(json.dumps(about), flush=True)
    rows: list[dict[str, Any]] = []
    shards: dict[str, Shard] = {}
    with tempfile.TemporaryDirectory(prefix="artemis-bench-") as folder:
        os.environ["ARTEMIS_VLM_CACHE"] = f"{folder}/cache"  # where the shards' indices are remembered
        for name, size, target in KINDS:
            shards[name] = write_shard(Path(folder) / f"{target}.tar", size, target, images)
            rows += measure_encoding(name, shards[name], tokenizer)
            print_rows(rows[-5:])
        os.sched_setaffinity(0, cores)  # the cluster takes none of the time that is measured
        join_or_start()  # Ray Data's reader keeps its list of files in a cluster; the reading itself is done here
        for name, shard in shards.items():
            rows += measure_reading(name, shard)
        ray.shutdown()
        print_rows(rows[len(KINDS) * 5 :])
    if json_file:
        Path(json_file).write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
    return 0


def print_rows(rows: Sequence[dict[str, Any]]) -> None:
    for row in rows:
        print("ROW " + "  ".join(f"{k} {v}" for k, v in row.items()), flush=True)


# --- what is encoded -------------------------------------------------------------------------------------------------


def photo(seed: int, size: tuple[int, int]) -> Image.Image:
    """Noise with as much in each octave, which JPEG finds as hard as a photograph."""
    rng = np.random.default_rng(seed)
    width, height = size
    raster = np.zeros((height, width, 3), np.float32)
    for octave in range(2, 9):
        coarse = rng.normal(size=(3, max(2, 2**octave * height // width), 2**octave)).astype(np.float32)
        bands = [np.asarray(Image.fromarray(band).resize(size, Image.Resampling.BICUBIC)) for band in coarse]
        raster += np.stack(bands, -1) * 2.0**-octave
    raster += rng.normal(size=raster.shape).astype(np.float32) * NOISE
    raster = (raster - raster.min()) / (raster.max() - raster.min()) * 255
    return Image.fromarray(raster.astype(np.uint8))


def jpeg_of(image: Image.Image, target: int) -> bytes:
    """The JPEG that just reaches `target` bytes."""

    def encoded(quality: int) -> bytes:
        out = io.BytesIO()
        image.save(out, "JPEG", quality=quality)
        return out.getvalue()

    low, high = 30, 99
    while low < high:  # the first quality that reaches the size
        middle = (low + high) // 2
        low, high = (low, middle) if len(encoded(middle)) >= target else (middle + 1, high)
    return encoded(low)


def write_shard(path: Path, size: tuple[int, int], target: int, count: int) -> Shard:
    pictures = [jpeg_of(photo(seed, size), target) for seed in range(DISTINCT)]
    rng = np.random.default_rng(0)
    with tarfile.open(path, "w") as archive:
        for index in range(count):
            caption = " ".join(rng.choice(TEXT.split(), 105)).encode()
            for extension, data in (("jpg", pictures[index % DISTINCT]), ("txt", caption)):
                member = tarfile.TarInfo(f"{index:06d}.{extension}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return Shard(path.name, str(path))


# --- measuring -------------------------------------------------------------------------------------------------------


def ways_to_encode(
    shard: Shard, samples: Sequence[RawSample], tokenizer: PreTrainedTokenizerBase, encoder: Encoder
) -> dict[str, Callable[[], None]]:
    """What encodes all samples of the shard, by name."""
    processor = image_processor_of(SPEC)

    def plain(sample: RawSample) -> Image.Image:
        image = Image.open(io.BytesIO(sample.image)).convert("RGB")
        rows, columns = resized_size(image.height, image.width, SPEC)
        return image.resize((columns, rows), Image.Resampling.BICUBIC)

    def hugging_face(sample: RawSample) -> Any:
        return processor(images=[Image.open(io.BytesIO(sample.image)).convert("RGB")], return_tensors="np")

    def published(sample: RawSample) -> Any:
        image = Image.open(io.BytesIO(sample.image)).convert("RGB")
        processor(images=[image], return_tensors="np")  # for the prompt's length
        return processor(images=[image], return_tensors="np"), tokenizer(sample.text.decode())

    def each(call: Callable[[RawSample], Any]) -> Callable[[], None]:
        def every() -> None:
            for sample in samples:
                call(sample)

        return every

    def tar_to_ids() -> None:
        for block in blocks(shard):
            for candidate in encoder.candidates(block):
                assert candidate.example is not None, candidate.error

    def tar_to_patches() -> None:
        for block in blocks(shard):
            for _, raw in block:
                patchify(decode_image(raw.image), SPEC)

    return {
        "decode and resize alone": each(plain),
        "tar to patches": tar_to_patches,
        "tar to patches and ids": tar_to_ids,
        "Hugging Face's processor": each(hugging_face),
        "published collator's way": each(published),
    }


def measure_encoding(name: str, shard: Shard, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """Images/s of each way, the median of several rounds, and of their ratios within a round."""
    with open_rows(shard) as found:
        samples = [found[index] for index in range(len(found))]
    encoder = Encoder(SPEC, tokenizer, CaptionFrame.build(tokenizer, "Describe this image in detail.", False), 2048)
    ways = ways_to_encode(shard, samples, tokenizer, encoder)
    for call in ways.values():
        call()
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(ROUNDS):
        for way, call in ways.items():
            seconds[way].append(cpu_seconds(call))
    example = encoder.candidate(Position(), samples[0]).example
    assert example is not None
    raster = example.patches.nbytes
    moved = dict(zip(ways, (raster, raster, raster + example.input_ids.nbytes, 8 * raster, 16 * raster)))

    def against(way: str, other: str) -> float:
        return round(median(b / a for a, b in zip(seconds[way], seconds[other])), 3)

    return [
        {
            "images": name,
            "way": way,
            "images_per_s": round(len(samples) / median(seconds[way]), 1),
            "of_decode_and_resize": against(way, "decode and resize alone"),
            "times_hugging_face": against(way, "Hugging Face's processor"),
            "times_published": against(way, "published collator's way"),
            "bytes_moved": moved[way],
        }
        for way in ways
    ]


def blocks(shard: Shard) -> Iterator[Sequence[tuple[Position, RawSample]]]:
    """The shard's samples, as many at once as the feed reads and encodes."""
    return by_bytes(Turn(shard, 0, 0, 0).read(), lambda read: len(read[1].image) + len(read[1].text), BLOCK_BYTES)


def cpu_seconds(call: Callable[[], None]) -> float:
    started = time.process_time()
    call()
    return time.process_time() - started


def measure_reading(name: str, shard: Shard) -> list[dict[str, Any]]:
    """Rows/s of a shard's reader and of Ray Data's, which is run here as its read task runs it on a worker."""
    from ray.data._internal.datasource.webdataset_datasource import WebDatasetDatasource

    def again() -> int:
        return sum(len(raw.image) > 0 for _, raw in Turn(shard, 0, 0, 0).read())

    def ours() -> int:
        shutil.rmtree(cache_folder(), ignore_errors=True)
        return again()

    def rays(decoder: bool | None) -> Callable[[], int]:
        def read() -> int:
            tasks = WebDatasetDatasource(shard.uri, decoder=decoder).get_read_tasks(1)
            return sum(len(block) for task in tasks for block in task())

        return read

    ways = {
        "our shard reader": ours,
        "the same, the shard's index remembered": again,
        "ray.data.read_webdataset": rays(True),
        "ray.data's, decoder=None": rays(None),
    }
    found: list[dict[str, Any]] = []
    for way, read in ways.items():
        read()
        best = []
        rows = 0
        for _ in range(3):
            started = time.process_time()
            rows = read()
            best.append(time.process_time() - started)
        found.append({"images": name, "way": way, "rows": rows, "rows_per_s": round(rows / median(best))})
    for row in found[1:]:
        row["ours_times"] = round(found[0]["rows_per_s"] / row["rows_per_s"], 1)
    return found
