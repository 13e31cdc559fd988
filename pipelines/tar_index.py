"""Where the samples of a WebDataset tar lie: found by walking its headers once, and remembered in the user's cache.

An index is remembered by the place of its shard, for one size and mtime (or etag) of it, and by nothing else: a shard
that has changed is walked again.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import logging
import os
import re
import tarfile
import tempfile
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from pipelines.storage import cache_folder

logger = logging.getLogger(__name__)

#: Zeros that may end a tar. Writers fill up their last 10 KiB; far more is a file whose rest was never written.
MAX_TAR_PADDING: Final = 1 << 16
#: The largest of the records that a tar may be written in (`tar -b 2048`), the last of them filled up with zeros.
MAX_TAR_RECORD: Final = 1 << 20
#: Of what is remembered; another number, and what an older program left is passed over.
FORMAT: Final = 2
#: Seconds after which a file that changes again has another mtime.
SETTLED_S: Final = 2.0
#: Fewer samples are found as fast as their index would be read.
MIN_REMEMBERED: Final = 256
#: Of all that is remembered; 27 million samples take 0.45 GB. The oldest goes first.
MAX_REMEMBERED_BYTES: Final = 1 << 30


@dataclass(frozen=True, slots=True)
class TarIndex:
    """The samples of a tar in file order, and the damaged stretches among them.

    samples: by key, [offset, bytes] of each of its files by extension
    errors: by key, why it cannot be used
    """

    samples: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)


# --- walking ---------------------------------------------------------------------------------------------------------


def walk(file: io.BufferedReader, size: int) -> TarIndex:
    """The index of a tar of `size` bytes. Each damaged stretch is a sample of its own that cannot be used."""
    index = TarIndex()
    for member, offset, length in _members(file, size, index):
        folder, _, base = member.rpartition("/")
        key, _, extension = base.partition(".")
        key = f"{folder}/{key}".lstrip("/")
        parts = index.samples.setdefault(key, {})
        if extension.lower() in parts:
            index.errors[key] = f"the shard holds {member} twice"
        parts[extension.lower()] = [offset, length]
    return index


def _members(file: io.BufferedReader, size: int, index: TarIndex) -> Iterator[tuple[str, int, int]]:
    """(name, offset, bytes) of each whole file, in order; damage goes into the index in its place.

    `tarfile` takes the first bad header for the end and may run for ever on a hostile one, so this walks by itself: over
    what is no header, block by block, to the next. Blocks of zeros end an archive and may stand between two.
    """
    at, name = 0, ""
    damage = zeros = 0  # bytes of each, the zeros last, just before `at`
    while at < size:
        block = read_at(file, at, tarfile.BLOCKSIZE)
        header = _header(block)
        start = at + tarfile.BLOCKSIZE
        if not header or start + header[1] > size:
            damage, zeros = (damage, zeros + len(block)) if not any(block) else (damage + zeros + len(block), 0)
            at += len(block)
            continue
        if damage or zeros > _most_padding(at):
            _damaged(index, at, damage + zeros)
        damage = zeros = 0
        short_name, length, kind = header
        at = start + -(-length // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        if kind == tarfile.GNUTYPE_LONGLINK:  # where the next member points; its name may have come already
            continue
        if kind in (tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME):
            name = _long_name(kind, read_at(file, start, length)) or name
            continue
        if kind in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE):
            yield name or short_name, start, length
        elif kind == tarfile.GNUTYPE_SPARSE:
            index.samples[key := f"({name or short_name})"] = {}
            index.errors[key] = "it is stored as a sparse file, which is not read; write the shard without --sparse"
        name = ""
    if damage or not 0 < zeros <= _most_padding(size):
        _damaged(index, min(at, size), damage + zeros)


def _most_padding(end: int) -> int:
    """Zeros that may lie before this place, where an archive ends: its end mark, and less than a record if it fills one."""
    record = min(end & -end, MAX_TAR_RECORD)  # the largest power of two of which the place is a multiple
    return max(MAX_TAR_PADDING, record + tarfile.BLOCKSIZE)


def read_at(file: io.BufferedReader, offset: int, length: int) -> bytes:
    return os.pread(file.fileno(), length, offset)  # in one call, beside the file's own buffer


def _damaged(index: TarIndex, end: int, length: int) -> None:
    key = f"(bytes {end - length} to {end})"
    index.samples[key] = {}
    index.errors[key] = f"{length} bytes of the shard are damaged" if length else "the shard is cut off: no end mark"


#: All but the name and the kind of a regular file's header, as every writer of today leaves it.
_NUMBERS: Final = re.compile(rb"(?:[0-7]{7}[\0 ]){3}([0-7]{11})[\0 ][0-7]{11}[\0 ]([0-7]{6})\0 0")
_DEVICE_AND_PREFIX: Final = re.compile(rb"(?:0{7}[\0 ]){2}\0|\0{17}")


def _header(block: bytes) -> tuple[str, int, bytes] | None:
    """(name, bytes, type) of the header in a block, if it is one; by `tarfile`, but for the plain ones, three times as fast.

    A name that is no UTF-8 becomes one: uids are text everywhere.
    """
    numbers = _NUMBERS.match(block, 100)
    if numbers and _DEVICE_AND_PREFIX.match(block, 329) and int(numbers[2], 8) == 256 + sum(block) - sum(block[148:156]):
        name = block[:100].partition(b"\0")[0].decode("utf-8", "backslashreplace")
        return name, int(numbers[1], 8), tarfile.REGTYPE
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "backslashreplace")
    except (tarfile.HeaderError, ValueError, OverflowError):  # a hostile number can raise any of them
        return None
    long = header.type in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
    if not (header.isreg() or long or header.type not in tarfile.SUPPORTED_TYPES):
        header.size = 0  # links and folders have no bytes, whatever they say
    return (header.name, header.size, header.type) if header.size >= 0 else None


def _long_name(kind: bytes, data: bytes) -> str:
    """The next member's name: of a pax header, if it gives one, or GNU's."""
    if kind == tarfile.XHDTYPE:
        found = re.search(rb"(?:^|\n)\d+ path=([^\n]*)\n", data)
        data = found[1] if found else b""
    return data.rstrip(b"\0").decode("utf-8", "backslashreplace")


# --- remembering -----------------------------------------------------------------------------------------------------


def index_of(file: io.BufferedReader, place: str, version: str | None = None) -> TarIndex:
    """The index of an open tar, from the cache if it is there.

    Args:
        place: where the shard is, which names what is remembered of it.
        version: of a remote shard, changes when its content does; empty: its store tells of no change, so nothing is
            remembered; None: the file is the shard itself, and its size and mtime tell.
    """
    status = os.fstat(file.fileno())
    size = status.st_size
    if version is None:  # a file may change again within its clock's tick
        version = f"{size} {status.st_mtime_ns}" if time.time() - status.st_mtime > SETTLED_S else ""
    if not version:
        return walk(file, size)
    path = cache_folder() / "tar-indices" / f"{hashlib.sha256(f'{FORMAT} {place}'.encode()).hexdigest()[:32]}.json.gz"
    if index := _remembered(path, place, version):
        return index
    index = walk(file, size)
    if len(index.samples) >= MIN_REMEMBERED:
        try:
            _remember(path, version, index)
        except OSError as error:  # a full disk or a foreign cache folder costs time, and nothing else
            logger.warning("the index of %s cannot be kept in %s: %s", place, path.parent, error)
    return index


def _remembered(path: Path, place: str, version: str) -> TarIndex | None:
    try:
        # gzip ends with a checksum: what was cut or changed does not come out of it
        found = json.loads(gzip.decompress(path.read_bytes()))
        if found["version"] != version:
            return None
        return TarIndex(found["samples"], found["errors"])
    except FileNotFoundError:
        return None
    except (OSError, EOFError, zlib.error, ValueError, LookupError, TypeError) as error:
        logger.warning("the index of %s in %s cannot be used and is made anew: %s", place, path, str(error) or repr(error))
        return None


def _remember(path: Path, version: str, index: TarIndex) -> None:
    """Written aside and renamed, so that of two processes one comes last and neither is read half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = json.dumps({"version": version, "samples": index.samples, "errors": index.errors}).encode()
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".writing-", delete=False) as aside:
        try:
            aside.write(gzip.compress(content, 1, mtime=0))
            aside.close()  # which writes the rest, or raises
            os.replace(aside.name, path)
        except BaseException:
            os.unlink(aside.name)
            raise
    _forget_oldest(path.parent)


def _forget_oldest(folder: Path) -> None:
    """Keeps the folder within its bound; what a killed process left half written grows old in it too."""
    found = []
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another process has just removed it
            status = path.stat()
            found.append((status.st_mtime_ns, status.st_size, path))
    excess = sum(size for _, size, _ in found) - MAX_REMEMBERED_BYTES
    for _, size, path in sorted(found):
        if excess <= 0:
            break
        path.unlink(missing_ok=True)
        excess -= size
