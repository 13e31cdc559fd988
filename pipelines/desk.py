"""What a run leaves in its output: run.json, metrics, quarantine, checkpoints, captions, the model, the report.

All of it can be cut off at any moment and continued: a checkpoint says how far the run is, so what belongs to it is
durable before it. Knows nothing of Ray.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, TextIO

from transformers import PreTrainedTokenizerBase

from artemis_vlm import graft
from artemis_vlm.errors import RunError
from artemis_vlm.examples import Example
from artemis_vlm.generation import caption
from artemis_vlm.image import PREPROCESSOR_FILE
from pipelines import card, report
from pipelines.align import Alignment, differences
from pipelines.checkpoint import BackgroundWriter, Checkpoint, CheckpointStore
from pipelines.inputs import Data, Parts
from pipelines.machine import machine
from pipelines.recipe import TrainConfig
from pipelines.report import CAPTIONS_FILE, METRICS_FILE, MODEL_FOLDER
from pipelines.shards import split_uid
from pipelines.storage import RunFolder, write_whole

logger = logging.getLogger(__name__)

RUN_FILE: Final = "run.json"
QUARANTINE_FILE: Final = "quarantine.jsonl"
EVENTS_FOLDER: Final = "tensorboard"


# --- whose output it is ----------------------------------------------------------------------------------------------


def earlier_run(output: RunFolder, config: TrainConfig) -> dict[str, Any] | None:
    """What the run in this output began with; None if there is none yet.

    Raises:
        RunError: it has another configuration; the text names the fields.
    """
    if not output.pull(RUN_FILE):
        return None
    try:
        run: dict[str, Any] = json.loads((output.path / RUN_FILE).read_text())
        found = differences(run["fingerprint"], config.fingerprint())
        _ = run["data"]["names"], run["eval_data"]["names"], run["held_out"]  # or it is damaged
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(
            f"{output.uri}/{RUN_FILE} is damaged; delete it if the output's checkpoints are this run's"
        ) from error
    if found:
        raise RunError(f"{output.uri} holds another run ({found}); choose another output, or the same values")
    return run


def claim(output: RunFolder, config: TrainConfig, parts: Parts, data: Data, owner: str) -> None:
    """Says in the output what the run is and that `owner` carries it on; an earlier owner stops at its next save."""
    before = json.loads((output.path / RUN_FILE).read_text()) if output.pull(RUN_FILE) else {}
    run = {
        "owner": owner,
        "started": before.get("started", _now()),
        **{k: before[k] for k in ("finished", "machine") if k in before},
        "fingerprint": config.fingerprint(),
        **data.identity(),
        "held_out": dict(data.source.held_out),
        "config": asdict(config),
        "sources": parts.sources.origins(),
    }
    output.write(RUN_FILE, json.dumps(run, indent=1) + "\n")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def check_owner(output: RunFolder, owner: str) -> None:
    """Raises RunError if another process has taken the run over: two would write over each other."""
    found = json.loads((output.path / RUN_FILE).read_text())["owner"] if output.pull(RUN_FILE) else None
    if found != owner:
        raise RunError(f"another job has taken over {output.uri}, or its {RUN_FILE} is gone; this one stops")


# --- what rank 0 writes ----------------------------------------------------------------------------------------------


class Desk:
    """Rank 0's paperwork: records, checkpoints, captions, the exported model and the report."""

    def __init__(
        self,
        config: TrainConfig,
        parts: Parts,
        alignment: Alignment,
        store: CheckpointStore,
        shown: Callable[[], Sequence[Example]],
        *,
        owner: str,
        on_saved: Callable[[], None],
        on_error: Callable[[], None],
    ) -> None:
        """
        Args:
            shown: gives the held-out samples that are captioned.
            on_saved: told of each checkpoint, in another thread.
            on_error: told, there too, that nothing more can be saved; the error is raised by the next call.
        """
        self.config, self.parts, self.alignment, self.store = config, parts, alignment, store
        self.folder, self.owner, self.shown, self.on_saved = RunFolder(config.output), owner, shown, on_saved
        self._writer = BackgroundWriter(on_error)
        self._metrics = self._continued(METRICS_FILE)
        self._quarantine = self._continued(QUARANTINE_FILE)
        from torch.utils.tensorboard import SummaryWriter  # imports slowly

        self._events = SummaryWriter(str(self.folder.path / EVENTS_FOLDER), purge_step=self.alignment.step + 1)
        if self.alignment.step == 0:
            self._write_captions("before")

    def _continued(self, name: str) -> TextIO:
        """A file of JSON lines, without what a lost process wrote past the checkpoint."""
        path = self.folder.path / name
        last = self.alignment.step - self.alignment.evaluation_due  # a step that is still to be evaluated is recorded after
        kept = ""
        if self.alignment.step and self.folder.pull(name):
            for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
                try:
                    kept += f"{line}\n" if json.loads(line)["step"] <= last else ""
                except ValueError:  # cut off with its process, if it is the last
                    logger.warning("%s/%s: line %d is damaged and dropped", self.folder.uri, name, number)
        write_whole(path, kept)  # a lost process that still lives has the old file in its hand
        return path.open("a", buffering=1)

    def record(self, record: Mapping[str, Any]) -> None:
        values = dict(record)
        for uid, reason in values.pop("quarantined_now", ()):
            shard, key = split_uid(uid)
            row = {"step": record["step"], "shard": shard, "key": key, "reason": reason}
            self._quarantine.write(json.dumps(row) + "\n")
        self._metrics.write(json.dumps(values) + "\n")
        for name, value in values.items():
            if name != "step" and not isinstance(value, str):
                self._events.add_scalar(name, value, record["step"])

    def save(self, checkpoint: Checkpoint) -> None:
        spec = json.dumps(self.parts.spec.to_dict(), indent=2).encode()
        checkpoint = replace(checkpoint, files={PREPROCESSOR_FILE: spec})
        best = self.alignment.best_step

        def write() -> None:
            check_owner(self.folder, self.owner)
            self._publish_records()  # first: without the checkpoint they are cut back, without them it has a gap
            self.store.write(checkpoint, best)
            self.on_saved()

        self._writer.submit(write)

    def _publish_records(self) -> None:
        for file in (self._metrics, self._quarantine):
            os.fsync(file.fileno())
        self._events.flush()
        for name in (METRICS_FILE, QUARANTINE_FILE, EVENTS_FOLDER):
            self.folder.publish(name)

    def close(self) -> None:
        """Waits until everything is written."""
        try:
            self._writer.close()
            check_owner(self.folder, self.owner)
            self._publish_records()
        finally:
            self._metrics.close()
            self._quarantine.close()
            self._events.close()
            self.folder.discard()

    def finish(self) -> None:
        """Captions after, the model folder, the report."""
        captions = self._write_captions("after")
        aside = self.folder.path / f".{MODEL_FOLDER}-writing"
        write = graft.write_model if self.config.export == "model" else graft.write_projector
        state = self.alignment.model.multi_modal_projector.state_dict()
        digest = write(aside, self.parts.sources, state, self.parts.spec)
        records = report.read_metrics(self.folder.path / METRICS_FILE)
        (aside / card.CARD_FILE).write_text(card.model_card(self._finished_run(), records, digest), encoding="utf-8")
        _replace_folder(aside, self.folder.path / MODEL_FOLDER)
        report.write_report(self.folder.path, self.config, captions, self.shown(), self.parts.spec)
        # A folder with a config.json is a whole model; the other kind has none.
        self.folder.publish(MODEL_FOLDER, last="config.json" if self.config.export == "model" else graft.MANIFEST_FILE)
        for name in (report.REPORT_FILE, report.CURVE_FILE):
            self.folder.publish(name)

    def _finished_run(self) -> dict[str, Any]:
        """The run's record, with where and until when it ran; a run that is asked for again keeps what it said first."""
        run: dict[str, Any] = json.loads((self.folder.path / RUN_FILE).read_text())
        about = machine(self.alignment.device, dtype=self.alignment.dtype, workers=self.config.workers)
        run = {"finished": _now(), "machine": about} | run
        self.folder.write(RUN_FILE, json.dumps(run, indent=1) + "\n")
        return run

    def _write_captions(self, when: str) -> list[dict[str, str]]:
        """Captions of the shown held-out images, kept from before training for the report after it."""
        shown = self.shown()
        rows = [{"uid": e.uid, "truth": _decode(self.parts.tokenizer, e.input_ids[e.n_prompt :])} for e in shown]
        if when == "after":  # of other samples, if the run was continued with another number of them
            kept = json.loads((self.folder.path / CAPTIONS_FILE).read_text()) if self.folder.pull(CAPTIONS_FILE) else []
            before = {row["uid"]: row.get("before", "") for row in kept}
            rows = [row | {"before": before.get(row["uid"], "")} for row in rows]
        with self.alignment.packed.original_weights():
            texts = caption(self.alignment.model, self.parts.tokenizer, shown, self.parts.spec)
        for row, text in zip(rows, texts):
            row[when] = text
        self.folder.write(CAPTIONS_FILE, json.dumps(rows, indent=1) + "\n")
        return rows


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Any) -> str:
    return str(tokenizer.decode(list(map(int, ids)), skip_special_tokens=True)).strip()


def _replace_folder(aside: Path, target: Path) -> None:
    """Puts a folder that was written aside in its place."""
    if target.exists():
        shutil.rmtree(target)
    aside.rename(target)
