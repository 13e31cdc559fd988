"""Tensors in safetensors files as bytes: where each lies, copied and hashed piece by piece, built one at a time if at all.

Knows nothing of models. A safetensors file is a length (8 bytes, little endian), a JSON header that gives each tensor's
dtype, shape and place, and the tensors' bytes in row-major order.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open

from artemis_vlm.errors import CheckpointError

CHUNK_BYTES: Final = 16 * 2**20
#: safetensors' names of what model files hold, and torch's, which manifests use.
DTYPES: Final = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
Digest = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in a file: `nbytes` bytes from `start`; `dtype` is torch's name of it."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int

    def chunks(self) -> Iterator[bytes]:
        with self.file.open("rb") as opened:
            opened.seek(self.start)
            left = self.nbytes
            while left:
                chunk = opened.read(min(left, CHUNK_BYTES))
                if not chunk:
                    raise CheckpointError(f"{self.file} ends {left} bytes early; fetch or write it again")
                left -= len(chunk)
                yield chunk

    def load(self) -> torch.Tensor:
        data = bytearray().join(self.chunks())
        return torch.frombuffer(data, dtype=torch.uint8).view(getattr(torch, self.dtype)).reshape(self.shape)


@dataclass(frozen=True, slots=True)
class Held:
    """A tensor in memory, with the same face."""

    tensor: torch.Tensor

    @property
    def dtype(self) -> str:
        return str(self.tensor.dtype).removeprefix("torch.")

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes

    def chunks(self) -> Iterator[memoryview]:
        yield self.tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def stored_in(file: Path) -> dict[str, Stored]:
    """Every tensor of a safetensors file.

    Raises:
        CheckpointError: missing or damaged, or a dtype that no model here has.
    """
    try:
        with safe_open(file, "pt"):  # checks that header and length agree
            pass
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header: dict[str, Any] = json.loads(opened.read(length))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is damaged: {error}; fetch or write it again") from error
    header.pop("__metadata__", None)
    found = {}
    for key, fields in header.items():
        if fields["dtype"] not in DTYPES:
            raise CheckpointError(f"{key} in {file} is {fields['dtype']}; expected one of {', '.join(DTYPES)}")
        start, end = fields["data_offsets"]
        found[key] = Stored(file, DTYPES[fields["dtype"]], tuple(fields["shape"]), 8 + length + start, end - start)
    return found


def digest(tensor: Stored | Held) -> Digest:
    """sha256 of a tensor's bytes, with its dtype and shape."""
    sha = hashlib.sha256()
    for chunk in tensor.chunks():
        sha.update(chunk)
    return {"sha256": sha.hexdigest(), "dtype": tensor.dtype, "shape": list(tensor.shape)}


def write(path: Path, tensors: Mapping[str, Stored | Held]) -> None:
    """A safetensors file of these tensors, copied through one chunk of memory, synced."""
    names = {torch_name: name for name, torch_name in DTYPES.items()}
    # Wide elements first, as the library writes them: then each tensor starts where its elements may.
    ordered = sorted(tensors.items(), key=lambda item: (-_element_bytes(item[1]), item[0]))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in ordered:
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for chunk in _all_chunks(tensor for _, tensor in ordered):
            out.write(chunk)
        out.flush()
        os.fsync(out.fileno())


def _all_chunks(tensors: Iterable[Stored | Held]) -> Iterator[bytes | memoryview]:
    for tensor in tensors:
        yield from tensor.chunks()


def _element_bytes(tensor: Stored | Held) -> int:
    return getattr(torch, tensor.dtype).itemsize  # type: ignore[no-any-return]
