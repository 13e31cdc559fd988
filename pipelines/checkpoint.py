"""Training checkpoints that are either whole or not there.

Written aside, synced to disk, listed with sha256, renamed; on a remote store, where nothing can be renamed, the list
of checksums goes up last, and a folder without it does not count. Reading takes the newest checkpoint whose every
file matches its checksum and names those it passed over. Knows nothing of models: tensors by name and a JSON state.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import queue
import shutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load, save

from artemis_vlm.errors import CheckpointError, RunError
from pipelines.storage import filesystem, is_remote, local_path, retried

logger = logging.getLogger(__name__)

CHECKSUMS_FILE: Final = "checksums.json"
STATE_FILE: Final = "state.json"
Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """What training needs to go on as if it had never stopped.

    step: optimizer steps taken
    tensors: file stem to tensors by name, such as `projector` and `optimizer`
    state: JSON: data position, counters, and what decides bits
    files: further small files by name, such as `preprocessor_config.json`
    """

    step: int
    tensors: Mapping[str, Tensors]
    state: Mapping[str, Any]
    files: Mapping[str, bytes]

    @property
    def name(self) -> str:
        return f"step_{self.step:08d}"

    def encode(self) -> dict[str, bytes]:
        encoded = {f"{stem}.safetensors": save(dict(tensors)) for stem, tensors in self.tensors.items()}
        encoded |= self.files
        encoded[STATE_FILE] = (json.dumps({**self.state, "step": self.step}, indent=1) + "\n").encode()
        sums = {name: hashlib.sha256(data).hexdigest() for name, data in encoded.items()}
        encoded[CHECKSUMS_FILE] = (json.dumps(sums, indent=1) + "\n").encode()  # last in order: on S3 it is the commit
        return encoded


class CheckpointStore:
    """The `checkpoints/` folder of a run, at a local or remote URI."""

    def __init__(self, uri: str, keep: int = 3) -> None:
        self.uri, self.keep = uri, keep
        self.remote = is_remote(uri)
        self._files, self._root = filesystem(uri if self.remote else str(local_path(uri)))

    def steps(self) -> list[int]:
        """Steps with a folder, oldest first; whether they are whole shows on reading."""
        self._files.invalidate_cache()
        try:
            found = retried(f"{self.uri} could not be listed", lambda: self._files.ls(self._root, detail=False))
        except FileNotFoundError:
            return []
        names = [Path(p).name for p in found]
        return sorted(int(n.removeprefix("step_")) for n in names if n.startswith("step_") and n[5:].isdigit())

    def write(self, checkpoint: Checkpoint, best_step: int | None = None) -> None:
        """Writes, reads back, and only then deletes all but the newest `keep` and the best.

        Raises:
            RunError: the store takes it not, or gives back something else.
        """
        encoded = checkpoint.encode()
        try:
            (self._write_remote if self.remote else self._write_local)(checkpoint.name, encoded)
            self.read(checkpoint.step)
        except (OSError, CheckpointError) as error:
            raise RunError(
                f"the checkpoint {checkpoint.name} could not be written to {self.uri}: {error}; earlier ones are as they "
                "were, make room there and give the same command again"
            ) from error
        steps = self.steps()
        later = [step for step in steps if step > checkpoint.step]  # damaged, or training had gone on from there
        old = [step for step in steps if step <= checkpoint.step][: -self.keep]
        for step in later + [step for step in old if step != best_step]:
            self._files.rm(f"{self._root}/step_{step:08d}", recursive=True)

    def _write_local(self, name: str, encoded: Mapping[str, bytes]) -> None:
        root = Path(self._root)
        root.mkdir(parents=True, exist_ok=True)
        for left_over in root.glob(".writing-*"):
            shutil.rmtree(left_over)
        aside = root / f".writing-{name}"
        aside.mkdir()
        try:
            for file, data in encoded.items():
                with open(aside / file, "wb") as out:
                    out.write(data)
                    out.flush()
                    os.fsync(out.fileno())
        except OSError:
            shutil.rmtree(aside)  # on a full disk, half a checkpoint is in everybody's way
            raise
        _sync_folder(aside)
        if (root / name).exists():  # a damaged one of the same step, or it would have been resumed from
            shutil.rmtree(root / name)
        aside.rename(root / name)
        _sync_folder(root)

    def _write_remote(self, name: str, encoded: Mapping[str, bytes]) -> None:
        for file, data in encoded.items():
            target = f"{self._root}/{name}/{file}"
            retried(f"{self.uri}/{name}/{file} could not be written", lambda: self._files.pipe_file(target, data))  # noqa: B023

    def read(self, step: int) -> Checkpoint:
        """One checkpoint, every file proven.

        Raises:
            CheckpointError: a file is missing, unreadable or does not match its checksum; the text names it.
            RunError: a remote store does not answer.
        """
        folder = f"{self._root}/step_{step:08d}"
        name = CHECKSUMS_FILE
        try:
            sums = json.loads(self._read_file(f"{folder}/{CHECKSUMS_FILE}"))
            found = {}
            for name, expected in sums.items():
                found[name] = self._read_file(f"{folder}/{name}")
                if hashlib.sha256(found[name]).hexdigest() != expected:
                    raise CheckpointError(f"{folder}/{name} does not match its checksum")
            state = json.loads(found.pop(STATE_FILE))
        except FileNotFoundError as error:
            raise CheckpointError(f"{folder} is not whole: {name} is missing") from error
        except OSError as error:
            raise CheckpointError(f"{folder}/{name} cannot be read: {error}") from error
        except (ValueError, AttributeError, KeyError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{folder}/{CHECKSUMS_FILE} is damaged") from error
        stems = {n.removesuffix(".safetensors"): load(found.pop(n)) for n in list(found) if n.endswith(".safetensors")}
        return Checkpoint(state["step"], stems, state, found)

    def _read_file(self, path: str) -> bytes:
        if self.remote:
            return bytes(retried(f"{path} could not be read", lambda: self._files.cat_file(path)))
        return Path(path).read_bytes()

    def newest(self) -> Checkpoint | None:
        """The newest whole checkpoint; damaged ones are passed over, each with a warning that names it."""
        for step in reversed(self.steps()):
            try:
                return self.read(step)
            except CheckpointError as error:
                logger.warning("passing over a damaged checkpoint: %s", error)
        return None


class BackgroundWriter:
    """One thread that writes, so that training does not wait; the next write waits for the one before.

    An error in the thread is told by `on_error`, there, and raised in the caller at its next call; of several, as a write
    may wait already when the one before fails, the first.
    """

    def __init__(self, on_error: Callable[[], None] = lambda: None) -> None:
        self._on_error = on_error
        self._work: queue.Queue[Callable[[], None] | None] = queue.Queue(maxsize=1)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="checkpoint-writer", daemon=True)
        self._thread.start()

    def submit(self, write: Callable[[], None]) -> None:
        self._raise()
        self._work.put(write)

    def close(self) -> None:
        """Waits until everything submitted is written."""
        self._work.put(None)
        self._thread.join()
        self._raise()

    def _run(self) -> None:
        while (write := self._work.get()) is not None:
            try:
                write()
            except BaseException as error:  # handed to the caller
                self._error = self._error or error
                self._on_error()

    def _raise(self) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            raise error


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
