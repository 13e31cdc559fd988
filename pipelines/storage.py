"""URIs wherever a path is taken: model folders to read, run folders to write; local, s3:// and the Hugging Face hub.

Knows nothing of what the files hold. S3 goes through s3fs (endpoint by `AWS_ENDPOINT_URL`), the hub through
huggingface_hub (endpoint by `HF_ENDPOINT`).
"""

from __future__ import annotations

import hashlib
import logging
import os
import posixpath
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Final, TypeVar

import fsspec
from huggingface_hub import HfApi, snapshot_download

from artemis_vlm.errors import CheckpointError, RunError

logger = logging.getLogger(__name__)
T = TypeVar("T")

#: Tries of anything that a store may refuse for a moment, with pauses of 1, 2, 4 seconds between them.
ATTEMPTS: Final = 4
#: Small files that a store is asked for at once.
FILES_AT_ONCE: Final = 32
#: What a model folder needs; anything else (pickles above all) is not even fetched.
MODEL_FILES: Final = ("*.json", "*.safetensors", "*.jinja")
_HUB_ID: Final = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A local folder, and where it came from: `uri` for a folder, `hf://ORG/NAME@commit` for the hub."""

    path: Path
    origin: str


def cache_folder() -> Path:
    """Where fetched and built things are kept: `ARTEMIS_VLM_CACHE`, else `artemis-vlm` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("ARTEMIS_VLM_CACHE") or Path(base) / "artemis-vlm")


def is_remote(uri: str) -> bool:
    return "://" in uri and not uri.startswith("file://")


def local_path(uri: str) -> Path:
    return Path(uri.removeprefix("file://")).expanduser().absolute()


def is_inside(uri: str, folder: str) -> bool:
    """Whether a place is a folder or lies in it, links and `..` followed; neither has to be there."""
    if is_remote(uri) != is_remote(folder):
        return False
    if not is_remote(uri):
        return local_path(uri).resolve().is_relative_to(local_path(folder).resolve())
    (scheme, _, place), (other, _, root) = uri.partition("://"), folder.partition("://")
    return scheme == other and PurePosixPath(posixpath.normpath(place)).is_relative_to(posixpath.normpath(root))


def is_hub_id(uri: str) -> bool:
    """Whether a name without a scheme is ORG/NAME on the hub: where no file has it."""
    return bool(_HUB_ID.fullmatch(uri)) and not local_path(uri).exists()


def retried(failure: str, attempt: Callable[[], T]) -> T:
    """Tries several times, with growing pauses; what is forbidden is not tried again.

    Args:
        failure: begins the sentence of the error, such as "the shard X could not be read".

    Raises:
        FileNotFoundError: at once.
        RunError: no attempt succeeded.
    """
    number = 1
    while True:
        try:
            return attempt()
        except FileNotFoundError:
            raise
        except Exception as error:  # each store has its own errors
            if number == ATTEMPTS or isinstance(error, PermissionError):
                raise RunError(f"{failure} in {number} attempts: {str(error) or repr(error)}") from error
            logger.warning("%s, attempt %d: %s", failure, number, error)
        time.sleep(0.5 * 2**number)
        number += 1


def each(read: Callable[[str], T], names: Sequence[str]) -> list[T]:
    """What `read` gives for each name, many at once, since asking a store takes long.

    One by one and not by fsspec's `cat` of many, which takes names with `[`, `*` or `?` for patterns.
    """
    with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
        return list(pool.map(read, names))


def fetch(files: Any, remote: str, target: Path) -> tuple[int, str | None]:
    """Copies a remote file here; one that comes short is an error.

    Returns:
        its size and what else tells its content from another's there: etag or mtime, None where the store gives neither.
    """
    info = files.info(remote)
    files.get_file(remote, str(target))
    if (found := target.stat().st_size) != info["size"]:
        raise OSError(f"{found} bytes came of {info['size']}")
    return _version(info)


def fetch_model(uri: str, marks: Sequence[str] = ("config.json",)) -> ModelFolder:
    """A model folder on this machine: as it is if local, through the hub's cache, or copied from S3.

    Args:
        marks: files of which a folder must hold one.

    Raises:
        CheckpointError: nothing there, or none of those files.
    """
    if uri.startswith("hf://") or is_hub_id(uri):
        found = _fetch_from_hub(uri)
    elif is_remote(uri):
        found = ModelFolder(_fetch_remote(uri), uri)
    else:
        found = ModelFolder(local_path(uri), uri)
    if not any((found.path / mark).exists() for mark in marks):
        what = f"has no {' or '.join(marks)}" if found.path.exists() else "does not exist"
        raise CheckpointError(f"the model {uri} {what}; expected a model folder, an s3:// URI or a hub id ORG/NAME")
    return found


def _fetch_from_hub(uri: str) -> ModelFolder:
    name, _, revision = uri.removeprefix("hf://").partition("@")
    try:
        commit = HfApi().model_info(name, revision=revision or None).sha
        path = snapshot_download(name, revision=commit, allow_patterns=list(MODEL_FILES))
    except OSError as error:  # huggingface_hub's own errors are OSErrors
        raise CheckpointError(f"the model {uri} is neither a local folder nor on the hub: {error}") from error
    return ModelFolder(Path(path), f"hf://{name}@{commit}")


def filesystem(uri: str, **options: Any) -> tuple[Any, str]:
    """fsspec's file system of a place, and the place in it; options are fsspec's.

    Raises:
        RunError: there is none of that name here.
    """
    try:
        found: tuple[Any, str] = fsspec.core.url_to_fs(uri, **options)
    except (ValueError, ImportError) as error:
        raise RunError(f"{uri} cannot be reached: {error}; expected a folder, an s3:// URI or a hub id") from error
    return found


def _fetch_remote(uri: str) -> Path:
    """Copies a remote folder into the cache, under a name that changes when the files do."""
    files, root = filesystem(uri)

    def versions() -> list[tuple[str, tuple[int, str | None]]]:
        wanted = [p for p in files.find(root) if p.endswith((".json", ".safetensors", ".jinja"))]
        return [(p, _version(files.info(p))) for p in wanted]

    listed = retried(f"the model {uri} could not be read", versions)
    wanted = [path for path, _ in listed]
    key = hashlib.sha256(repr(listed).encode()).hexdigest()[:16]
    target = cache_folder() / "models" / key
    if target.exists() or not wanted:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=target.parent))
    for path in wanted:
        relative = path.removeprefix(root).lstrip("/")
        (aside / relative).parent.mkdir(parents=True, exist_ok=True)
        retried(f"{uri}/{relative} could not be read", partial(fetch, files, path, aside / relative))
    try:
        aside.rename(target)
    except OSError:  # another process was first; its copy is the same
        shutil.rmtree(aside)
    return target


def _version(info: dict[str, Any]) -> tuple[int, str | None]:
    found = info.get("ETag") or info.get("etag") or info.get("mtime")
    return info["size"], str(found) if found else None


@dataclass(frozen=True)
class RunFolder:
    """The output of a run: written in a local folder; if the URI is remote, published from there.

    `path` is where to write. For a local URI it is the output itself and publishing does nothing.
    """

    uri: str
    path: Path = field(init=False)

    def __post_init__(self) -> None:
        if not self.uri:
            raise RunError("the run has no output; give a folder or an s3:// URI")
        local = Path(tempfile.mkdtemp(prefix="artemis-run-")) if self.remote else local_path(self.uri)
        with writing(self.uri):
            local.mkdir(parents=True, exist_ok=True)
        object.__setattr__(self, "path", local)

    @property
    def remote(self) -> bool:
        return is_remote(self.uri)

    def pull(self, name: str) -> bool:
        """Brings one file of an earlier session of this run; whether there was one."""
        if not self.remote:
            return (self.path / name).exists()
        files, root = filesystem(self.uri)
        (self.path / name).parent.mkdir(parents=True, exist_ok=True)
        files.invalidate_cache()
        try:
            retried(f"{self.uri}/{name} could not be read", lambda: fetch(files, f"{root}/{name}", self.path / name))
        except FileNotFoundError:
            return False
        return True

    def publish(self, name: str, last: str = "") -> None:
        """Copies a written file, or a folder's files, to the remote output; the file called `last` goes last."""
        if not self.remote:
            return
        files, root = filesystem(self.uri)
        source = self.path / name
        found = [source] if source.is_file() else [p for p in source.rglob("*") if p.is_file()]
        for path in sorted(found, key=lambda p: (p.name == last, p)):
            target = f"{root}/{path.relative_to(self.path).as_posix()}"
            retried(f"{self.uri}/{name} could not be written", lambda: files.put_file(str(path), target))  # noqa: B023

    def write(self, name: str, text: str) -> None:
        """Writes a file so that it is there whole or not at all, whenever this process ends, and publishes it."""
        with writing(self.uri):
            write_whole(self.path / name, text)
        self.publish(name)

    def discard(self) -> None:
        """Removes the local folder of a remote output."""
        if self.remote:
            shutil.rmtree(self.path, ignore_errors=True)


@contextmanager
def writing(place: str) -> Iterator[None]:
    """What the system says of a place that cannot be written, as a RunError."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise RunError(f"the output {place} cannot be written: {reason}; make room there, or choose another") from error


def write_whole(path: Path, text: str) -> None:
    """Replaces a file in one go, synced to disk."""
    aside = path.with_name(f".{path.name}-writing")
    with aside.open("w", encoding="utf-8") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    aside.replace(path)
