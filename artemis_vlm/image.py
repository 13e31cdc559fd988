"""Image bytes to pixel patches: the one pixel path of training, serving and captioning.

Knows nothing of tokens or models, and never imports torch. Pixels stay uint8 and one frame deep (768 bytes a
patch); normalisation and the repeated temporal frame belong to the device that runs the tower. The patch order is
that of Qwen2-VL's image processors (`transformers.Qwen2VLImageProcessorPil`), with which the values agree bit for bit.
"""

from __future__ import annotations

import io
import json
import logging
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageFile, ImageOps

from artemis_vlm.errors import CheckpointError, SampleError

logger = logging.getLogger(__name__)

CLIP_MEAN: Final = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD: Final = (0.26862954, 0.26130258, 0.27577711)
#: What strangers may send. Pillow registers 43 decoders by default; each is attack surface.
FORMATS: Final = ("JPEG", "PNG", "WEBP", "GIF")
#: Rasters above this are refused before they are decoded (a 64-megapixel RGB raster takes 192 MiB).
MAX_DECODED_PIXELS: Final = 64_000_000
MAX_ASPECT_RATIO: Final = 200  # Qwen2-VL's own limit
PREPROCESSOR_FILE: Final = "preprocessor_config.json"
# Pillow hands pixels out in pieces of this size and joins them; a plane of an image of `ImageSpec`'s size is now one piece.
ImageFile.MAXBLOCK = max(ImageFile.MAXBLOCK, 512 * 512)


@dataclass(frozen=True, slots=True)
class ImageSpec:
    """How a checkpoint wants its images: saved with it as `preprocessor_config.json` under Hugging Face's field names.

    `min_pixels` and `max_pixels` are areas, in pixels, of the resized image. `image_mean` and `image_std` apply to
    RGB values in [0, 1].
    """

    patch_size: int = 16
    temporal_patch_size: int = 2
    merge_size: int = 2
    min_pixels: int = 32 * 32
    max_pixels: int = 512 * 512
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        for name in ("patch_size", "temporal_patch_size", "merge_size", "min_pixels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.max_pixels < max(self.min_pixels, self.factor**2):
            raise ValueError(
                f"max_pixels is {self.max_pixels}; it must reach min_pixels ({self.min_pixels}) "
                f"and one merged patch ({self.factor**2})"
            )
        if len(self.image_mean) != 3 or len(self.image_std) != 3 or min(self.image_std) <= 0:
            raise ValueError(f"image_mean and image_std need 3 values, std above 0; got {self.image_mean}, {self.image_std}")

    @property
    def factor(self) -> int:
        """Pixels along each side of one image token."""
        return self.patch_size * self.merge_size

    @property
    def patch_bytes(self) -> int:
        """Bytes of one single-frame uint8 RGB patch (768 at patch size 16)."""
        return 3 * self.patch_size**2

    @property
    def max_patches(self) -> int:
        """At least those of any image that `patchify` cuts: a narrow one keeps a whole token across, beyond max_pixels."""
        narrow = self.factor * math.isqrt(MAX_ASPECT_RATIO * self.max_pixels)
        enlarged = self.min_pixels + self.factor * (math.isqrt(MAX_ASPECT_RATIO * self.min_pixels) + 2 * self.factor)
        enlarged += self.factor * math.isqrt(self.min_pixels)
        return max(self.max_pixels, narrow, enlarged) // self.patch_size**2

    def tokens(self, grid: tuple[int, int]) -> int:
        """Image tokens of a (height, width) grid of patches."""
        return grid[0] * grid[1] // self.merge_size**2

    def with_limits(self, min_pixels: int | None, max_pixels: int | None) -> ImageSpec:
        return replace(
            self,
            min_pixels=self.min_pixels if min_pixels is None else min_pixels,
            max_pixels=self.max_pixels if max_pixels is None else max_pixels,
        )

    def to_dict(self) -> dict[str, Any]:
        """The fields of Qwen3-VL's own `preprocessor_config.json`."""
        return {
            "image_processor_type": "Qwen2VLImageProcessor",
            "size": {"shortest_edge": self.min_pixels, "longest_edge": self.max_pixels},
            "patch_size": self.patch_size,
            "temporal_patch_size": self.temporal_patch_size,
            "merge_size": self.merge_size,
            "image_mean": list(self.image_mean),
            "image_std": list(self.image_std),
        }

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> ImageSpec:
        """Reads Hugging Face's fields; the older `min_pixels`/`max_pixels` are accepted beside `size`.

        A file without mean or std means CLIP's, the default of Qwen2-VL's image processors.
        """
        default = cls()
        size = fields.get("size") or {}
        try:
            return cls(
                patch_size=int(fields.get("patch_size", default.patch_size)),
                temporal_patch_size=int(fields.get("temporal_patch_size", default.temporal_patch_size)),
                merge_size=int(fields.get("merge_size", default.merge_size)),
                min_pixels=int(size.get("shortest_edge") or fields.get("min_pixels") or default.min_pixels),
                max_pixels=int(size.get("longest_edge") or fields.get("max_pixels") or default.max_pixels),
                image_mean=tuple(map(float, fields.get("image_mean") or CLIP_MEAN)),  # type: ignore[arg-type]
                image_std=tuple(map(float, fields.get("image_std") or CLIP_STD)),  # type: ignore[arg-type]
            )
        except (TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"{PREPROCESSOR_FILE} is not a Qwen2-VL style preprocessor configuration: {error}"
            ) from error

    def save(self, folder: str | Path) -> None:
        (Path(folder) / PREPROCESSOR_FILE).write_text(json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> ImageSpec:
        """The spec of a local model folder.

        Checkpoints of the published `artemis-vlm` package carry no file: they were aligned on CLIP-normalised pixels
        (its processor never passed a mean), so that is what a missing file means.
        """
        path = Path(folder) / PREPROCESSOR_FILE
        if not path.exists():
            logger.warning("%s has no %s: using CLIP mean/std, as the published artemis-vlm did", folder, PREPROCESSOR_FILE)
            return cls(image_mean=CLIP_MEAN, image_std=CLIP_STD)
        try:
            fields = json_object(path)
        except CheckpointError as error:
            raise CheckpointError(f"{error}; write it again or delete it to use CLIP's mean/std") from error
        return cls.from_dict(fields)


def json_object(path: Path) -> dict[str, Any]:
    """The fields that a checkpoint's file holds.

    Raises:
        CheckpointError: it is not there, or holds something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.parent} lacks {path.name}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds a JSON {type(found).__name__}; expected an object")
    return found


@dataclass(frozen=True, slots=True, eq=False)
class Patches:
    """One image as the tower wants it.

    pixels: uint8 (grid[0] * grid[1], 3 * patch_size**2), merge-ordered, each patch (channel, row, column)
    grid: height and width in patches
    """

    pixels: npt.NDArray[np.uint8]
    grid: tuple[int, int]


def decode_image(data: bytes, max_pixels: int = MAX_DECODED_PIXELS) -> Image.Image:
    """JPEG, PNG, WebP or GIF (first frame) bytes to an upright RGB image.

    The size is checked before the raster is decoded. Pillow's own error text never leaves (it can carry addresses).

    Raises:
        SampleError: not one of the formats, damaged, empty, too large or too elongated.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise SampleError(f"the image has too many pixels; the limit is {max_pixels}") from error
    except Exception as error:  # Pillow's decoders raise nearly anything on hostile bytes
        raise SampleError(f"{len(data)} bytes are not a readable image; expected {', '.join(FORMATS)}") from error
    width, height = image.size
    if width * height > max_pixels:
        raise SampleError(f"the image is {width}x{height} = {width * height} pixels; the limit is {max_pixels}")
    check_aspect_ratio(height, width)
    try:
        return upright_rgb(image)
    except Exception as error:
        raise SampleError(f"the {image.format} image ({width}x{height}) is damaged") from error


def upright_rgb(image: Image.Image) -> Image.Image:
    """The raster of an opened image, turned as its EXIF says, in RGB; the image itself where it is so already.

    Raises whatever Pillow does on a damaged one.
    """
    image.load()
    if image.mode == "I;16":  # which convert("RGB") would clip, not scale
        image = image.point(lambda v: v / 256).convert("L")
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:  # or a right one would be copied
        image = ImageOps.exif_transpose(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def check_aspect_ratio(height: int, width: int) -> None:
    if min(height, width) < 1:
        raise SampleError(f"the image is {width}x{height}; both sides must be at least 1 pixel")
    if max(height, width) / min(height, width) > MAX_ASPECT_RATIO:
        raise SampleError(f"the image is {width}x{height}; one side may be at most {MAX_ASPECT_RATIO} times the other")


def resized_size(height: int, width: int, spec: ImageSpec) -> tuple[int, int]:
    """Height and width, multiples of `spec.factor`, with an area in [min_pixels, max_pixels] and nearly the same ratio.

    Qwen2-VL's `smart_resize` (transformers, models/qwen2_vl/image_processing_qwen2_vl.py), without its import of torch.
    """
    check_aspect_ratio(height, width)
    factor = spec.factor
    rows, columns = round(height / factor) * factor, round(width / factor) * factor
    if rows * columns > spec.max_pixels:
        shrink = math.sqrt(height * width / spec.max_pixels)
        rows = max(factor, math.floor(height / shrink / factor) * factor)
        columns = max(factor, math.floor(width / shrink / factor) * factor)
    elif rows * columns < spec.min_pixels:
        grow = math.sqrt(spec.min_pixels / (height * width))
        rows, columns = math.ceil(height * grow / factor) * factor, math.ceil(width * grow / factor) * factor
    return rows, columns


def patchify(image: Image.Image, spec: ImageSpec) -> Patches:
    """An RGB image, resized (bicubic) and cut into merge-ordered patches.

    Equals `Qwen2VLImageProcessorPil(...)(image)` before its rescale, normalise and temporal repeat.
    """
    rows, columns = resized_size(image.height, image.width, spec)
    resized = image.resize((columns, rows), Image.Resampling.BICUBIC)
    patch, merge = spec.patch_size, spec.merge_size
    grid = rows // patch, columns // patch
    blocks = grid[0] // merge, grid[1] // merge
    line = np.dtype((np.void, patch))  # one row of a patch, moved as a whole
    pixels = np.empty((*blocks, merge, merge, 3, patch), line)
    for channel, name in enumerate("RGB"):
        tiles = np.frombuffer(resized.tobytes("raw", name), line).reshape(blocks[0], merge, patch, blocks[1], merge)
        pixels[:, :, :, :, channel] = tiles.transpose(0, 3, 1, 4, 2)
    return Patches(pixels.view(np.uint8).reshape(grid[0] * grid[1], spec.patch_bytes), grid)


def unpatchify(patches: Patches, spec: ImageSpec) -> Image.Image:
    """The RGB image that `patchify` cut, at its resized size; for reports."""
    rows, columns = patches.grid
    patch, merge = spec.patch_size, spec.merge_size
    tiles = patches.pixels.reshape(rows // merge, columns // merge, merge, merge, 3, patch, patch)
    raster = tiles.transpose(0, 2, 5, 1, 3, 6, 4).reshape(rows * patch, columns * patch, 3)
    return Image.fromarray(raster)
