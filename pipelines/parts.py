"""The output of captioning: parts that are there whole or not at all, and a manifest when all of them are.

A part holds the captions of a bounded run of rows of one input shard, and its name says which and of how many
(`sa_000000-00003-of-00010.parquet`), so a listing tells what is left to do. One process writes parts; each is written
aside and renamed (on S3: put in one request), then a note of its counts and hash in `.parts/` says that it is done.
What is done is never written again. `_SUCCESS` comes last. Knows nothing of models, images or Ray.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import posixpath
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from artemis_vlm.errors import RunError
from pipelines.storage import each, filesystem, is_remote, local_path, retried, write_whole, writing

#: Hidden, so that readers of the folder as a data set pass over them.
RUN_FILE: Final = ".run.json"
NOTES: Final = ".parts"
SUCCESS_FILE: Final = "_SUCCESS"
#: Parts on their way to the store.
WRITERS: Final = 2

SCHEMA: Final = pa.schema(
    {
        "key": pa.string(),
        "shard": pa.string(),
        "row": pa.int64(),
        "caption": pa.string(),
        "finish_reason": pa.string(),
        "image_tokens": pa.int64(),
        "prompt_tokens": pa.int64(),
        "caption_tokens": pa.int64(),
        "model": pa.string(),
        "prompt": pa.string(),
        "seed": pa.int64(),
        "error": pa.string(),
    }
)


@dataclass(frozen=True, slots=True)
class CaptionRow:
    """One input row's outcome: a caption, or an error and no caption.

    key, shard, row: which input it was; row counts within the shard
    finish_reason: "stop" or "length"
    image_tokens, prompt_tokens, caption_tokens: the prompt's include the image's; the caption's its ending token
    model: fingerprint of the weights and files that decide a caption
    seed: what drew the tokens, if the temperature was above 0
    """

    key: str
    shard: str
    row: int
    caption: str | None
    finish_reason: str | None
    image_tokens: int
    prompt_tokens: int
    caption_tokens: int
    model: str
    prompt: str
    seed: int
    error: str | None

    def canonical(self) -> bytes:
        """The same bytes for the same content, whatever file it is in."""
        return json.dumps(asdict(self), ensure_ascii=False, sort_keys=True).encode("utf-8", "backslashreplace") + b"\n"


@dataclass(frozen=True, slots=True)
class Note:
    """What is known of a part that is done: its rows, those without a caption by reason, tokens, hash of the content."""

    rows: int
    failed: Mapping[str, int]
    caption_tokens: int
    sha256: str


def content_hash(rows: Sequence[CaptionRow]) -> str:
    """sha256 of the rows in order. Not of the file: Parquet's bytes change with its writer's version."""
    return hashlib.sha256(b"".join(row.canonical() for row in rows)).hexdigest()


def tar_members(key: str, files: Mapping[str, bytes]) -> bytes:
    """The files of one WebDataset sample as a piece of a tar, the same bytes for the same files."""
    out = io.BytesIO()
    for extension, data in files.items():
        member = tarfile.TarInfo(f"{key}.{extension}")
        member.size = len(data)
        out.write(member.tobuf(tarfile.PAX_FORMAT) + data + bytes(-len(data) % tarfile.BLOCKSIZE))
    return out.getvalue()


# --- the store -------------------------------------------------------------------------------------------------------


class Store:
    """A folder, local or remote, in which files appear whole."""

    def __init__(self, uri: str) -> None:
        self.uri, self.remote = uri.rstrip("/"), is_remote(uri)
        # others write here too: a listing of before would hide their files, also from `read`
        self._files, self._root = filesystem(self.uri if self.remote else str(local_path(uri)), use_listings_cache=False)

    def names(self) -> set[str]:
        """Of all files."""
        found = retried(f"the output {self.uri} could not be listed", lambda: self._files.find(self._root))
        return {posixpath.relpath(path, self._root) for path in found}

    def read(self, names: Sequence[str]) -> dict[str, bytes]:
        return dict(zip(names, each(self._read, names)))

    def _read(self, name: str) -> bytes:
        path = posixpath.join(self._root, name)
        data: bytes = retried(f"{self.uri}/{name} could not be read", lambda: self._files.cat_file(path))
        return data

    def write(self, name: str, text: str) -> None:
        if self.remote:
            self._retried(name, lambda: self._files.pipe_file(posixpath.join(self._root, name), text.encode()))
            return
        path = Path(self._root, name)
        with writing(self.uri):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, text)

    def put(self, name: str, source: IO[bytes]) -> None:
        """Writes a file with an open one's content."""
        source.seek(0)
        if self.remote:
            with tempfile.NamedTemporaryFile() as copy:
                _copy(source, copy)
                self._retried(name, lambda: self._files.put_file(copy.name, posixpath.join(self._root, name)))
            return
        path = Path(self._root, name)
        aside = path.with_name(f".{path.name}-writing")
        with writing(self.uri):
            path.parent.mkdir(parents=True, exist_ok=True)
            with aside.open("wb") as out:
                _copy(source, out)
                os.fsync(out.fileno())
            aside.replace(path)

    def _retried(self, name: str, attempt: Any) -> None:
        with writing(self.uri):  # such as a bucket that is not there
            retried(f"{self.uri}/{name} could not be written", attempt)

    def open(self, name: str) -> Any:
        return self._files.open(posixpath.join(self._root, name), "rb")


def _copy(source: IO[bytes], target: Any) -> None:
    while chunk := source.read(1 << 20):
        target.write(chunk)
    target.flush()


# --- the output ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Layout:
    """How rows of shards become parts.

    shards: names, in order
    suffix: "parquet" or "tar"
    part_rows: rows of a part; a shard's last may have fewer
    """

    shards: Sequence[str]
    suffix: str
    part_rows: int

    def stems(self) -> list[str]:
        """What each shard's parts are called: its name without the suffix, where that is still unique."""
        stems = [str(PurePosixPath(name).with_suffix("")) for name in self.shards]
        return stems if len(set(stems)) == len(stems) else list(self.shards)

    def sizes(self, rows: int) -> list[int]:
        """Rows of each part of a shard; an empty one has one part, which is empty too."""
        return [min(self.part_rows, rows - at) for at in range(0, rows, self.part_rows)] or [0]

    def part(self, stem: str, number: int, of: int) -> str:
        return f"{stem}-{number:05d}-of-{of:05d}.{self.suffix}"


class Output:
    """An output folder and what is already in it.

    Raises:
        RunError: it holds the captions of another run, or cannot be read.
    """

    def __init__(self, uri: str, layout: Layout) -> None:
        self.store, self.layout = Store(uri), layout
        self.notes: dict[str, Note] = {}
        names = self.store.names()
        self.complete = SUCCESS_FILE in names
        self.run: dict[str, Any] | None = None
        if RUN_FILE in names:
            self.run = json.loads(self.store.read([RUN_FILE])[RUN_FILE])
        noted = [n for n in names if n.startswith(f"{NOTES}/") and n.endswith(".json")]
        parts = {note: note.removeprefix(f"{NOTES}/").removesuffix(".json") for note in noted}
        there = [note for note, part in parts.items() if part in names]
        self.notes = {parts[note]: Note(**json.loads(data)) for note, data in self.store.read(there).items()}
        if self.run is None and any(n.endswith((".parquet", ".tar", ".arrow")) for n in names):
            raise RunError(f"the output {uri} holds data that no captioning wrote; choose another output")

    def claim(self, run: Mapping[str, Any]) -> None:
        """Says whose output this is, or checks that it is this run's."""
        if self.run is None:
            self.store.write(RUN_FILE, json.dumps(run, indent=1, ensure_ascii=False) + "\n")
            self.run = dict(run)
            return
        for name in {**self.run, **run}:  # quantization is left out where it is none
            ours, theirs = run.get(name, "none"), self.run.get(name, "none")
            if ours != theirs:
                raise RunError(
                    f"the output {self.store.uri} holds captions with another {name} ({_short(theirs)}, now "
                    f"{_short(ours)}); give the same {name} to continue, or choose another output"
                )

    def done(self) -> list[tuple[set[int], int]]:
        """For each shard the parts that are there, and of how many (0: not known yet)."""
        found: dict[str, tuple[set[int], int]] = {}
        for part in self.notes:
            stem, _, of = part.removesuffix(f".{self.layout.suffix}").rpartition("-of-")
            stem, _, number = stem.rpartition("-")
            found.setdefault(stem, (set(), int(of)))[0].add(int(number))
        return [found.get(stem, (set(), 0)) for stem in self.layout.stems()]

    def write_part(self, part: str, rows: Sequence[CaptionRow], file: IO[bytes]) -> Note:
        failed = Counter(row.error for row in rows if row.error is not None)
        tokens = sum(row.caption_tokens for row in rows)
        note = Note(len(rows), dict(sorted(failed.items())), tokens, content_hash(rows))
        self.store.put(part, file)
        self.store.write(f"{NOTES}/{part}.json", json.dumps(asdict(note), ensure_ascii=False) + "\n")
        self.notes[part] = note
        return note

    def finish(self) -> dict[str, Any]:
        """Writes `_SUCCESS`: the run, the counts, and a hash that two runs share if their captions are the same."""
        parts = {part: self.notes[part] for part in sorted(self.notes)}
        failed: Counter[str] = Counter()
        for note in parts.values():
            failed.update(note.failed)
        content = "".join(f"{part} {note.rows} {note.sha256}\n" for part, note in parts.items())
        manifest = {
            "rows": sum(note.rows for note in parts.values()),
            "failed": failed.total(),
            "errors": dict(failed.most_common(100)),
            "caption_tokens": sum(note.caption_tokens for note in parts.values()),
            "sha256": hashlib.sha256(content.encode()).hexdigest(),
            "run": self.run,
            "parts": {part: {"rows": note.rows, "sha256": note.sha256} for part, note in parts.items()},
        }
        self.store.write(SUCCESS_FILE, json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
        self.complete = True
        return manifest

    def rows(self, part: str) -> Iterator[tuple[CaptionRow, bytes]]:
        """A part's rows, each with its image file in a WebDataset (empty in Parquet)."""
        with self.store.open(part) as file:
            if self.layout.suffix == "parquet":
                for row in pq.read_table(io.BytesIO(file.read())).to_pylist():
                    yield CaptionRow(**row), b""
                return
            with tarfile.open(fileobj=file, mode="r:") as archive:
                image = b""
                for member in archive:
                    extension = posixpath.basename(member.name).partition(".")[2]
                    extracted = archive.extractfile(member)
                    data = extracted.read() if extracted else b""
                    if extension == "caption.json":
                        yield CaptionRow(**json.loads(data)), image
                        image = b""
                    elif extension in ("jpg", "jpeg", "png", "webp", "gif"):
                        image = data


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 120 else f"{text[:117]}..."


# --- collecting rows into parts --------------------------------------------------------------------------------------


@dataclass
class _Open:
    """A part of which rows are still missing. Files of samples wait on disk, in a file that ends with this process."""

    expected: int
    rows: dict[int, CaptionRow] = field(default_factory=dict)
    places: dict[int, tuple[int, int]] = field(default_factory=dict)
    spool: IO[bytes] | None = None


class Collector:
    """Takes rows in any order, any of them more than once, and writes each part when it is whole."""

    def __init__(self, output: Output) -> None:
        self.output, self.layout = output, output.layout
        self._stems = self.layout.stems()
        self._known = [of for _, of in output.done()]
        self._open: dict[str, _Open] = {}
        self._closed = set(output.notes)
        self._writers = ThreadPoolExecutor(WRITERS)
        self._writing: list[Future[Note]] = []

    def add(self, shard: int, shard_rows: int, row: CaptionRow, files: bytes) -> bool:
        """Whether the row was new.

        Args:
            shard_rows: of the whole shard.
            files: the sample's members of a tar, for a WebDataset.

        Raises:
            RunError: the shard has another number of rows than when some of it was captioned, or a part cannot be written.
        """
        sizes = self.layout.sizes(shard_rows)
        number, of = row.row // self.layout.part_rows, len(sizes)
        name = self.layout.part(self._stems[shard], number, of)
        if self._known[shard] not in (0, of):
            raise RunError(
                f"the shard {row.shard} now has {shard_rows} rows, which are {of} parts of this output; it began with "
                f"{self._known[shard]}; bring back the file that was there, or choose another output"
            )
        if name in self._closed:
            return False
        part = self._open.setdefault(name, _Open(sizes[number]))
        if row.row in part.rows:
            return False
        part.rows[row.row] = row
        if self.layout.suffix == "tar":
            self._spool(part, row, files)
        if len(part.rows) == part.expected:
            self._write(name, self._open.pop(name))
        return True

    def empty(self, shard: int) -> None:
        """A shard without a row."""
        self._write(self.layout.part(self._stems[shard], 0, 1), _Open(0))

    def _spool(self, part: _Open, row: CaptionRow, files: bytes) -> None:
        if part.spool is None:
            part.spool = tempfile.TemporaryFile(prefix="artemis-captions-")  # noqa: SIM115
        # a damaged stretch has no files, and a key that names bytes
        key = (_first_key(files) if files else None) or f"{row.row:08d}"
        text = {"caption.txt": row.caption.encode("utf-8", "backslashreplace")} if row.caption is not None else {}
        members = files + tar_members(key, text | {"caption.json": row.canonical()})
        part.places[row.row] = part.spool.seek(0, os.SEEK_END), len(members)
        part.spool.write(members)

    def _write(self, name: str, part: _Open) -> None:
        self._closed.add(name)
        if len(self._writing) >= 2 * WRITERS:
            self._writing.pop(0).result()
        self._writing.append(self._writers.submit(self._save, name, part))

    def _save(self, name: str, part: _Open) -> Note:
        rows = [part.rows[number] for number in sorted(part.rows)]
        with tempfile.TemporaryFile(prefix="artemis-captions-") as file:
            if self.layout.suffix == "parquet":
                pq.write_table(pa.Table.from_pylist([asdict(row) for row in rows], SCHEMA), file)
            else:
                for place, length in (part.places[row.row] for row in rows):
                    assert part.spool is not None
                    part.spool.seek(place)
                    file.write(part.spool.read(length))
                file.write(bytes(2 * tarfile.BLOCKSIZE))
            if part.spool is not None:
                part.spool.close()
            return self.output.write_part(name, rows, file)

    def close(self) -> None:
        """Waits until everything is written.

        Raises:
            RunError: something could not be, or rows are missing.
        """
        for future in self._writing:
            future.result()
        self._writers.shutdown()
        if self._open:
            name, part = next(iter(self._open.items()))
            raise RunError(
                f"{len(self._open)} parts lack rows, {name} has {len(part.rows)} of {part.expected}; run the same command "
                "again"
            )


def _first_key(members: bytes) -> str:
    """The key in the first header of a piece of a tar."""
    with tarfile.open(fileobj=io.BytesIO(members), mode="r:") as archive:
        member = archive.next()
    if member is None:
        return ""
    folder, name = posixpath.split(member.name)
    return posixpath.join(folder, name.partition(".")[0])
