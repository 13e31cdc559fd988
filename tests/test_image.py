"""The pixel path: equal to Hugging Face's PIL processor bit for bit, and hard on strangers' images."""

from __future__ import annotations

import io
import json
import logging
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from artemis_vlm import CheckpointError, ImageSpec, SampleError
from artemis_vlm.image import CLIP_MEAN, CLIP_STD, decode_image, patchify, resized_size, unpatchify
from artemis_vlm.modeling import normalize
from artemis_vlm.processing import image_processor_of

SIZES = [(640, 480), (33, 200), (500, 375), (17, 31), (1, 150), (512, 512), (1000, 31), (2000, 1500)]
SPECS = [ImageSpec(), ImageSpec(image_mean=CLIP_MEAN, image_std=CLIP_STD, min_pixels=256 * 256, max_pixels=300 * 300)]


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    rng = np.random.default_rng(width * height)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).convert(mode)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=["half", "clip"])
def test_patches_equal_the_hf_processor_bit_for_bit(size: tuple[int, int], spec: ImageSpec) -> None:
    image = picture(*size)
    ours = patchify(image, spec)
    theirs = image_processor_of(spec)(images=[image], return_tensors="pt")
    assert theirs["image_grid_thw"].tolist() == [[1, *ours.grid]]
    frame = normalize(torch.from_numpy(ours.pixels), spec)
    both = frame.view(len(frame), 3, 1, -1).expand(-1, -1, 2, -1).reshape(len(frame), -1)
    assert torch.equal(both, theirs["pixel_values"])
    resized = unpatchify(ours, spec)
    assert resized.size == resized_size(size[1], size[0], spec)[::-1]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF"])
def test_formats(kind: str) -> None:
    assert decode_image(encoded(picture(40, 30), kind)).size == (40, 30)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_modes_become_rgb(mode: str) -> None:
    image = decode_image(
        encoded(picture(20, 20).convert(mode), "TIFF" if mode == "?" else "JPEG" if mode == "CMYK" else "PNG")
    )
    assert image.mode == "RGB"


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    ramp = Image.fromarray(np.linspace(0, 65535, 256, dtype=np.uint16).reshape(16, 16))
    values = np.asarray(decode_image(encoded(ramp, "PNG")))[..., 0].ravel()
    assert values.min() == 0
    assert values.max() == 255
    assert len(set(values.tolist())) > 200


def test_exif_rotation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode_image(encoded(picture(40, 30), "JPEG", exif=exif)).size == (30, 40)


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "not a readable image"),
        (b"<svg></svg>", "not a readable image"),
        (encoded(picture(9, 9), "BMP"), "expected JPEG, PNG, WEBP, GIF"),
        (encoded(picture(64, 64), "JPEG")[:400], "damaged|not a readable"),
        (png_header(30_000, 30_000), "limit is 64000000|too many pixels"),
        (png_header(9_000, 9_000), "9000x9000 = 81000000 pixels"),
        (png_header(60_000, 1), "at most 200 times"),
        (encoded(picture(1000, 4), "PNG"), "at most 200 times"),
    ],
    ids=["empty", "svg", "bmp", "truncated", "bomb", "large", "line", "strip"],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_refused_images_say_why(data: bytes, says: str) -> None:
    with pytest.raises(SampleError, match=says) as refused:
        decode_image(data)
    assert "at 0x" not in str(refused.value), "Pillow's text can carry addresses"


def test_spec_round_trips_under_hugging_faces_names(tmp_path: Path) -> None:
    spec = ImageSpec(max_pixels=300 * 300, image_mean=CLIP_MEAN, image_std=CLIP_STD)
    spec.save(tmp_path)
    assert ImageSpec.load(tmp_path) == spec
    fields = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert fields["size"] == {"shortest_edge": 1024, "longest_edge": 90000}
    released = {
        "size": {"longest_edge": 16777216, "shortest_edge": 65536},
        "patch_size": 16,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": "Qwen3VLProcessor",
    }
    assert ImageSpec.from_dict(released) == ImageSpec(min_pixels=65536, max_pixels=16777216)


def test_a_folder_without_a_spec_means_clip(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        spec = ImageSpec.load(tmp_path)
    assert (spec.image_mean, spec.image_std) == (CLIP_MEAN, CLIP_STD)
    assert "using CLIP mean/std" in caplog.text


@pytest.mark.parametrize("text", ["{", '{"size": 3}', '{"patch_size": "x"}', '{"image_std": [0, 1, 1]}'])
def test_a_damaged_spec_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "preprocessor_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json"):
        ImageSpec.load(tmp_path)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"[]", "holds a JSON list; expected an object"),
        (b"5", "holds a JSON int"),
        (b'{"a": "\xff"}', "is not JSON: .*utf-8"),
    ],
)
def test_a_spec_that_is_no_object_is_named(tmp_path: Path, data: bytes, says: str) -> None:
    (tmp_path / "preprocessor_config.json").write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"preprocessor_config\.json {says}.*; write it again or delete it"):
        ImageSpec.load(tmp_path)


@pytest.mark.parametrize(("low", "high"), [(1024, 320 * 320), (65536, 16777216), (3136, 4096), (65536, 65536), (1024, 1024)])
def test_no_image_has_more_patches_than_the_bound(low: int, high: int) -> None:
    """Kernels are told the bound, and leave rows of a larger image unwritten."""
    spec, rng = ImageSpec(min_pixels=low, max_pixels=high), random.Random(0)
    most = 0
    for _ in range(20_000):
        short = max(1, round(10 ** rng.uniform(0, 3.3)))
        long = round(short * rng.choice((1, 200, rng.uniform(1, 200))))
        rows, columns = resized_size(*rng.choice(((short, long), (long, short))), spec)
        most = max(most, rows * columns // spec.patch_size**2)
    assert high // spec.patch_size**2 * 0.9 <= most <= spec.max_patches
