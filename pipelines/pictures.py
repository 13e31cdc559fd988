"""Images wherever they lie: WebDataset shards, tables with images or URLs, folders of files; captioned or not.

One `PictureShard` is one unit of reading. Knows nothing of what is done with the images.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, Final, Protocol, TypeVar

import fsspec

from artemis_vlm.errors import RunError
from pipelines.shards import (
    IMAGE_EXTENSIONS,
    Shard,
    TarRows,
    image_bytes,
    list_files,
    opened,
    read_table,
    shards_among,
    spelled,
)
from pipelines.storage import FILES_AT_ONCE, each, is_remote, retried

T = TypeVar("T")

FILE_SUFFIXES: Final = (".jpg", ".jpeg", ".png", ".webp", ".gif")
#: How image files begin, for those that have lost their names.
MAGIC: Final = ((b"\xff\xd8", "jpg"), (b"\x89PNG", "png"), (b"RIFF", "webp"), (b"GIF8", "gif"))


@dataclass(frozen=True, slots=True)
class PictureShard:
    """A tar or a table, or some plain files; `name` orders and names, `uri` is where it is now."""

    name: str
    uri: str
    files: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Picture:
    """One image, or where it is, or why it is not there.

    key: of the sample in its shard: WebDataset's, the row's number in a table, or a file's path in its folder, as text
    files: all that the sample is in a WebDataset, by extension; empty elsewhere
    """

    key: str
    image: bytes = b""
    url: str = ""
    error: str = ""
    files: Mapping[str, bytes] = field(default_factory=dict)


class Pictures(Protocol):
    """The images of an open shard, in order."""

    def __len__(self) -> int: ...
    def read(self, rows: Iterable[int]) -> Iterator[Picture]: ...


def find_pictures(uri: str, group: int) -> list[PictureShard]:
    """The shards at a location, sorted by name; of plain image files, `group` make one.

    Raises:
        RunError: nothing there, nothing of a known kind, or shards and plain files mixed.
    """
    files = list_files(uri)
    plain = sorted(f for f in files if f.lower().endswith(FILE_SUFFIXES) and not posixpath.basename(f).startswith("."))
    if not plain:
        return [PictureShard(shard.name, shard.uri) for shard in shards_among(uri, files)]
    if any(f.endswith((".tar", ".parquet", ".arrow")) for f in files):
        raise RunError(f"the data {uri} holds both shards and {len(plain)} plain image files; caption one, then the other")
    root = posixpath.commonpath([posixpath.dirname(f) for f in plain])
    groups = [plain[at : at + group] for at in range(0, len(plain), group)]
    names = [tuple(str(PurePosixPath(f).relative_to(root)) for f in g) for g in groups]
    folder = plain[0][: -len(names[0][0])]  # not `root`, which has lost a slash of s3://
    return [PictureShard(f"images-{number:06d}", folder, each) for number, each in enumerate(names)]


def open_pictures(shard: PictureShard) -> AbstractContextManager[Pictures]:
    """
    Raises:
        RunError: it could not be read, is a damaged table, or one without images.
    """
    if shard.files:
        return nullcontext(FilePictures(shard))
    return opened(Shard(shard.name, shard.uri), TarPictures, TablePictures)


class TarPictures(TarRows):
    """WebDataset, with or without captions."""

    def read(self, rows: Iterable[int]) -> Iterator[Picture]:
        for row in rows:
            key, files, error = self.files(row)
            images = [extension for extension in files if extension in IMAGE_EXTENSIONS]
            if not error and len(images) != 1:
                error = f"the sample has {len(images)} images: found {spelled(files)}, expected one"
            yield Picture(key, b"" if error else files[images[0]], error=error, files=files)


class TablePictures:
    """Parquet or Arrow with a column `image` (bytes, or a struct with them) or `url`."""

    def __init__(self, shard: Shard, path: Path) -> None:
        (self.cells,) = read_table(shard, path, [("image", "url", "URL", "image_url")], "image or url").columns

    def __len__(self) -> int:
        return len(self.cells)

    def read(self, rows: Iterable[int]) -> Iterator[Picture]:
        for row in rows:
            cell: Any = image_bytes(self.cells[row].as_py())
            key = f"{row:08d}"
            if isinstance(cell, bytes):
                yield Picture(key, cell)
            elif isinstance(cell, str):
                yield Picture(key, url=cell)
            else:
                yield Picture(key, error="the row has no image bytes and no URL")


class FilePictures:
    """Plain files."""

    def __init__(self, shard: PictureShard) -> None:
        self.shard = shard

    def __len__(self) -> int:
        return len(self.shard.files)

    def read(self, rows: Iterable[int]) -> Iterator[Picture]:
        files, root = fsspec.core.url_to_fs(self.shard.uri)
        for some in _batched(rows, FILES_AT_ONCE):
            names = [self.shard.files[row] for row in some]
            read = partial(_file, files, root)
            for name, data in zip(names, each(read, names) if is_remote(self.shard.uri) else map(read, names)):
                key = as_text(name)
                yield Picture(key, data) if isinstance(data, bytes) else Picture(key, error=data)


def _file(files: Any, root: str, name: str) -> bytes | str:
    """The bytes of a file, or why there are none."""
    path, said = posixpath.join(root, name), as_text(name)
    try:
        data: bytes = retried(f"the file {said} could not be read", lambda: files.cat_file(path))
    except FileNotFoundError:
        return f"the file {said} is gone"
    except RunError as error:
        return str(error)
    return data


def as_text(name: str) -> str:
    """A file's name with what is no UTF-8 in it, which Python keeps as surrogates, spelled out."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def image_extension(data: bytes) -> str:
    """What a file of these bytes is called."""
    return next((extension for magic, extension in MAGIC if data.startswith(magic)), "bin")


def _batched(items: Iterable[T], count: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while batch := list(islice(iterator, count)):
        yield batch
