"""Small real samples: pictures, captions, the shards that hold them, and what encodes them."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from PIL import Image
from transformers import PreTrainedTokenizerBase

from artemis_vlm import ImageSpec
from artemis_vlm.chat import CaptionFrame
from pipelines.data import Candidate, Encoder

#: Files of one sample by extension, with its key.
Sample = tuple[str, Mapping[str, bytes | str]]


def jpeg(seed: int = 0, width: int = 48, height: int = 40) -> bytes:
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(coarse).resize((width, height)).save(out, "JPEG")
    return out.getvalue()


def sample(number: int) -> Sample:
    image = jpeg(number, 32 + 8 * (number % 5), 40)
    return f"{number:05d}", {"jpg": image, "txt": f"Picture {number}, " + "seen from afar " * (number % 4)}


def write_tar(path: Path, samples: Iterable[Sample]) -> Path:
    with tarfile.open(path, "w") as archive:
        for key, files in samples:
            for extension, content in files.items():
                data = content.encode() if isinstance(content, str) else content
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return path


def write_shards(folder: Path, shards: int, rows: int) -> Path:
    """`sa_%06d.tar` with `rows` good samples each."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        write_tar(folder / f"sa_{shard:06d}.tar", map(sample, range(shard * rows, (shard + 1) * rows)))
    return folder


def caption_encoder(tokenizer: PreTrainedTokenizerBase, max_tokens: int = 256) -> Encoder:
    frame = CaptionFrame.build(tokenizer, "Describe this image.", False)
    return Encoder(ImageSpec(max_pixels=64 * 64), tokenizer, frame, max_tokens)


def content(candidate: Candidate) -> tuple[object, ...]:
    """All of a candidate, comparable with ==."""
    e = candidate.example
    body = None if e is None else (e.uid, e.input_ids.tobytes(), e.n_prompt, e.patches.tobytes(), e.patches.shape, e.grid)
    return candidate.after, candidate.uid, candidate.error, body
