"""Shards: files of captioned images, wherever they are, and the samples in them. Knows nothing of order or encoding.

WebDataset tars, Parquet, and what `datasets` saves; local, on S3, or on the hub at a pinned commit.
"""

from __future__ import annotations

import glob
import hashlib
import io
import logging
import os
import posixpath
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final, Protocol, TypeVar

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from artemis_vlm.errors import RunError
from pipelines.storage import fetch, is_hub_id, is_remote, local_path, retried
from pipelines.tar_index import TarIndex, index_of, read_at

logger = logging.getLogger(__name__)
T = TypeVar("T")

IMAGE_EXTENSIONS: Final = frozenset({"jpg", "jpeg", "png", "webp", "gif"})
#: A caption that was written here goes before the one that came with the image.
TEXT_EXTENSIONS: Final = ("caption.txt", "txt")
SHARD_SUFFIXES: Final = (".tar", ".parquet", ".arrow")
TEXT_COLUMNS: Final = ("text", "caption")
HUB_COMMIT: Final = re.compile(r"hf://datasets/[\w.-]+/[\w.-]+@(?P<commit>[0-9a-f]{40})/")
_UID: Final = re.compile(rf"(.+?(?:{'|'.join(map(re.escape, SHARD_SUFFIXES))}))/(.*)", re.DOTALL)
#: Rows of a Parquet file in one batch.
PARQUET_ROWS: Final = 64


@dataclass(frozen=True, slots=True)
class Shard:
    """A file of samples. `name` decides the order and names samples; `uri` is where it is now."""

    name: str
    uri: str


@dataclass(frozen=True, slots=True)
class RawSample:
    """What a shard holds of one sample; `error` says why it cannot be used."""

    uid: str
    image: bytes = b""
    text: bytes = b""
    error: str = ""


# --- where the samples are -------------------------------------------------------------------------------------------


def find_shards(uri: str) -> list[Shard]:
    """The shards at a location, sorted by name; lists names only, opens nothing.

    Args:
        uri: a file, folder or glob, local or s3://; `hf://datasets/ORG/NAME[@revision][/path]`; or a hub dataset id
            ORG/NAME. What is on the hub is pinned to the commit it has now.

    Raises:
        RunError: nothing there, or nothing of a known kind.
    """
    return shards_among(uri, list_files(uri))


def shards_among(uri: str, files: Sequence[str]) -> list[Shard]:
    """`find_shards` from the files that `list_files` found there."""
    # `DatasetDict.save_to_disk` makes a folder a split
    splits = [posixpath.dirname(f) for f in files if posixpath.basename(f) == "dataset_dict.json"]
    files = [f for f in files if not splits or f.startswith(tuple(f"{place}/train/" for place in splits))]
    shards = [f for f in files if _is_shard(PurePosixPath(f))]
    if not shards:
        what = f"holds {len(files)} files, none of them a shard" if files else "holds nothing"
        if not (files or is_remote(uri) or glob.has_magic(uri) or local_path(uri).exists()):
            what = "does not exist"
        raise RunError(f"the data {uri} {what}; expected .tar (WebDataset) or .parquet files, or a saved dataset")
    root = posixpath.commonpath([posixpath.dirname(f) for f in shards])
    return sorted((Shard(str(PurePosixPath(s).relative_to(root)), s) for s in shards), key=lambda shard: shard.name)


def _is_shard(path: PurePosixPath) -> bool:
    """Whether a file holds samples; `datasets` leaves results of `map` as cache-*.arrow in the folder that it saved."""
    return path.suffix in SHARD_SUFFIXES and not path.name.startswith((".", "cache-"))


def list_files(uri: str) -> list[str]:
    """Every file at a location: of a folder all below it, of a hub dataset those for training.

    Raises:
        RunError: it cannot be listed.
    """
    try:
        return _list_files(uri)
    except Exception as error:  # each store has its own errors
        here = "no such folder is here, and on the hub: " if is_hub_id(uri) else ""
        raise RunError(f"the data {uri} cannot be listed: {here}{str(error) or repr(error)}") from error


def _list_files(uri: str) -> list[str]:
    if uri.startswith("hf://"):
        return _hub_files(uri)
    if is_remote(uri):
        return _remote_files(uri)
    path = local_path(uri)
    if is_hub_id(uri):
        return _hub_files(f"hf://datasets/{uri}")
    places = [str(path)] if path.exists() else sorted(glob.glob(str(path)))
    return [place for place in places if os.path.isfile(place)] + list(_files_below(filter(os.path.isdir, places)))


def _files_below(folders: Iterable[str]) -> Iterator[str]:
    """Every file in the folders and below, behind links to folders too; of a folder that is met twice once."""
    seen: set[str] = set()
    left = list(folders)
    for start in left:  # links come after all that lies below by itself, which keeps its own name
        for folder, below, files in os.walk(start):
            real = os.path.realpath(folder)
            if real in seen:
                below.clear()
                continue
            seen.add(real)
            below.sort()
            left += [path for name in below if os.path.islink(path := os.path.join(folder, name))]
            yield from (path for name in files if os.path.isfile(path := os.path.join(folder, name)))


def _remote_files(uri: str) -> list[str]:
    files, root = fsspec.core.url_to_fs(uri)
    found = files.glob(root) if glob.has_magic(root) else files.find(root)
    return [files.unstrip_protocol(path) for path in found]


def _hub_files(uri: str) -> list[str]:
    """Files on the hub, at the commit that the revision, or the default one, means now.

    Of a whole dataset only the training files, as its card, its folders or its file names say (`datasets` knows how).
    """
    from datasets import load_dataset_builder  # imports slowly, and only hub data needs it
    from huggingface_hub import HfApi, HfFileSystem
    from huggingface_hub.hf_file_system import HfFileSystemResolvedRepositoryPath

    place = HfFileSystem().resolve_path(uri)
    if not isinstance(place, HfFileSystemResolvedRepositoryPath) or place.repo_type != "dataset":
        raise RunError("it is not a dataset; expected hf://datasets/ORG/NAME[@revision][/path]")
    commit = HfApi().dataset_info(place.repo_id, revision=place.revision).sha
    logger.info("dataset %s at commit %s", place.repo_id, commit)
    if place.path_in_repo:
        return _remote_files(f"hf://datasets/{place.repo_id}@{commit}/{place.path_in_repo}")
    splits = load_dataset_builder(place.repo_id, revision=commit).config.data_files or {}
    return [str(f) for f in splits.get("train") or next(iter(splits.values()), [])]


@contextmanager
def local_copy(shard: Shard) -> Iterator[tuple[Path, str | None]]:
    """The shard as a local file for a while; remote ones are fetched, with backoff. And the version of a remote one.

    Fetched whole, also to go on in the middle: the rows that are left lie anywhere in it, and thousands of small requests
    would take minutes where one takes seconds.

    Raises:
        RunError: it could not be opened after several attempts.
    """
    gone = f"the shard {shard.uri} is gone; bring it back, or start a new run without it"
    if not is_remote(shard.uri):
        path = local_path(shard.uri)
        if not path.is_file():
            raise RunError(gone)
        yield path, None
        return
    files, remote = fsspec.core.url_to_fs(shard.uri)
    pinned = HUB_COMMIT.match(shard.uri)
    if not pinned:
        files.invalidate_cache(remote)  # a listing may be older than the file
    with tempfile.TemporaryDirectory(prefix="artemis-shard-") as folder:
        target = Path(folder) / PurePosixPath(remote).name
        try:
            found = retried(f"the shard {shard.uri} could not be read", lambda: fetch(files, remote, target))
        except FileNotFoundError as error:
            raise RunError(gone) from error
        yield target, repr(found) if pinned or found[1] else ""


def split_uid(uid: str) -> tuple[str, str]:
    """A sample's shard and its key there; either may have folders."""
    found = _UID.fullmatch(uid)
    return (found[1], found[2]) if found else ("", uid)


# --- what is in a shard ----------------------------------------------------------------------------------------------


class Rows(Protocol):
    """The samples of one open shard, in file order; reading one touches only its bytes."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> RawSample: ...


def open_rows(shard: Shard) -> AbstractContextManager[Rows]:
    """The rows of a shard of any kind.

    Raises:
        RunError: it could not be opened, or is a table that is damaged or has other columns.
    """
    return opened(shard, TarRows, TableRows)


@contextmanager
def opened(
    shard: Shard, tar: Callable[[str, io.BufferedReader, TarIndex], T], table: Callable[[Shard, Path], T]
) -> Iterator[T]:
    """A shard as one of two readers: of a tar (its name, file and index), or of a table (the shard, its local file)."""
    with local_copy(shard) as (path, version), ExitStack() as stack:
        if shard.name.endswith(".tar"):
            file = stack.enter_context(retried(f"the shard {shard.uri} could not be read", lambda: path.open("rb")))
            rows = tar(shard.name, file, index_of(file, shard.uri if is_remote(shard.uri) else str(path), version))
        else:
            rows = table(shard, path)
        if is_remote(shard.uri):
            path.unlink()  # what is open outlives its name, so a killed process leaves no shard behind
        yield rows


class TarRows:
    """WebDataset: members `<key>.jpg` and `<key>.txt`. Each damaged stretch of a tar is one bad row; all else is used."""

    def __init__(self, name: str, file: io.BufferedReader, index: TarIndex) -> None:
        self.name, self.file, self.index = name, file, index
        self._keys = list(index.samples)

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, index: int) -> RawSample:
        key = self._keys[index]
        uid, parts = f"{self.name}/{key}", self.index.samples[key]
        images = [extension for extension in parts if extension in IMAGE_EXTENSIONS]
        text = next((extension for extension in TEXT_EXTENSIONS if extension in parts), None)
        if error := self.index.errors.get(key):
            return RawSample(uid, error=error)
        if len(images) != 1 or text is None:
            return RawSample(uid, error=f"the pair is not whole: found {spelled(parts)}, expected an image and txt")
        return RawSample(uid, read_at(self.file, *parts[images[0]]), read_at(self.file, *parts[text]))

    def files(self, index: int) -> tuple[str, dict[str, bytes], str]:
        """All of a sample: its key, its files by extension, and what is wrong with the stretch of tar it was in."""
        key = self._keys[index]
        files = {e: read_at(self.file, *at) for e, at in self.index.samples[key].items()}
        return key, files, self.index.errors.get(key, "")


def spelled(extensions: Iterable[str]) -> str:
    """A sample's files, for what is said of it."""
    return ", ".join(extension or "a file without an extension" for extension in extensions) or "nothing"


class TableRows:
    """Parquet, or the Arrow files of `datasets.save_to_disk`: a column `image` (bytes, or a struct with them) and a text."""

    def __init__(self, shard: Shard, path: Path) -> None:
        self.name = shard.name
        table = read_table(shard, path, [("image",), TEXT_COLUMNS], "image, and text or caption")
        self.images, self.texts = table.columns

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> RawSample:
        uid = f"{self.name}/{index}"
        image, text = image_bytes(self.images[index].as_py()), self.texts[index].as_py()
        if not isinstance(image, bytes) or not isinstance(text, str):
            return RawSample(uid, error="the row has no image bytes or no text")
        return RawSample(uid, image, text.encode())


def image_bytes(value: Any) -> Any:
    """Of a cell of an image column, which holds them or a struct with them."""
    return value.get("bytes") if isinstance(value, dict) else value


def read_table(shard: Shard, path: Path, wanted: Sequence[Sequence[str]], expected: str) -> pa.Table:
    """For each of the wanted, the first column that there is by one of its names; a table that stays on disk.

    Args:
        expected: the wanted in words.

    Raises:
        RunError: the file is damaged or lacks one of them.
    """
    try:
        names = pq.read_schema(path).names if path.suffix == ".parquet" else _mapped(path).column_names
        columns = [column for names_of in wanted if (column := next((n for n in names_of if n in names), None))]
        if len(columns) < len(wanted):
            raise RunError(f"the shard {shard.uri} has the columns {names}; expected {expected}")
        return _unpacked(path, columns) if path.suffix == ".parquet" else _mapped(path).select(columns)
    except (pa.ArrowException, OSError) as error:
        raise RunError(f"the shard {shard.uri} is damaged: {error}; fetch or write it again") from error


def _mapped(path: Path) -> pa.Table:
    """A stream of Arrow batches as a table that stays on disk."""
    with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as stream:
        return stream.read_all()


def _unpacked(path: Path, columns: list[str]) -> pa.Table:
    """Columns of a Parquet file as a table on disk: rows are wanted in any order, and Parquet gives them in one.

    A page of the file at a time is in memory; nothing is left if the process is killed.
    """
    with tempfile.TemporaryDirectory(prefix="artemis-shard-") as folder:
        target = Path(folder) / "rows.arrow"
        with pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
            schema = pa.schema([file.schema_arrow.field(column) for column in columns])
            with pa.OSFile(str(target), "wb") as sink, pa.ipc.new_stream(sink, schema) as out:
                for batch in file.iter_batches(PARQUET_ROWS, columns=columns):
                    out.write_batch(batch.select(columns))
        return _mapped(target)


# --- whether it is the same data -------------------------------------------------------------------------------------


def identity(shards: Sequence[Shard]) -> dict[str, Any]:
    """What data must be for a run to continue on it, wherever it lies: the shards' names, and the commit of hub data."""
    digest = hashlib.sha256("\n".join(shard.name for shard in shards).encode()).hexdigest()
    pinned = HUB_COMMIT.match(shards[0].uri)
    return {"shards": len(shards), "names": digest, "commit": pinned["commit"] if pinned else None}


def check_same_data(uri: str, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Raises RunError where a run would continue on other data than it began with."""
    if theirs["names"] != ours["names"]:
        raise RunError(
            f"the data {uri} has other shards ({ours['shards']}) than the run began with ({theirs['shards']}); the order "
            "of samples follows their names, so bring back the same files, or choose another output"
        )
    if theirs["commit"] != ours["commit"]:
        raise RunError(
            f"the data {uri} is at commit {ours['commit']}, the run began with {theirs['commit']}; name that one after an @ "
            "(hf://datasets/ORG/NAME@COMMIT), or choose another output"
        )
