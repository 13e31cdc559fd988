"""Projector-only alignment on Ray Train: the driver that starts the ranks, and what each rank does.

The loop itself is `pipelines.align`. Ray Train starts the ranks, restarts them after a failure and carries no
checkpoint: those are `pipelines.checkpoint`'s, because Ray's snapshot has no checksum and no fallback.
"""

from __future__ import annotations

import asyncio
import signal
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, TypeVar

import ray
import ray.train
import torch
from ray.exceptions import RayError
from ray.train import FailureConfig, RunConfig
from ray.train.collective import broadcast_from_rank_zero
from ray.train.torch import TorchTrainer
from ray.train.v2.api.exceptions import TrainingFailedError
from ray.util.metrics import Gauge
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from artemis_vlm import graft
from artemis_vlm.errors import ArtemisError, RunError
from pipelines import align, report
from pipelines.align import Alignment
from pipelines.checkpoint import CheckpointStore
from pipelines.desk import Desk, claim, earlier_run
from pipelines.feed import HeldOut, RayFeed, find_feeder, start_feeder
from pipelines.inputs import Data, Parts, anchored, find_data, find_parts
from pipelines.placement import data_selector, placement, with_workers
from pipelines.recipe import TrainConfig
from pipelines.report import CAPTIONS_FILE, METRICS_FILE
from pipelines.storage import RunFolder

T = TypeVar("T")

#: Restarts of failed workers without a checkpoint between them before the run fails.
MAX_FAILURES: Final = 3


@dataclass(frozen=True)
class Job:
    """What the driver hands to every rank. `owner` is this driver's mark in the output."""

    config: TrainConfig
    data: Data
    held_out: HeldOut
    board: Any
    owner: str


# --- the driver ------------------------------------------------------------------------------------------------------


def fit(config: TrainConfig) -> Path:
    """Runs or continues a training run on the cluster that this process is connected to.

    Returns:
        The local folder with the run's metrics, captions and report (a copy, if the output is remote).

    Raises:
        ArtemisError: before any work, if the configuration, the inputs, the output or the cluster do not fit; later,
            if the run must stop.
    """
    config = anchored(config)
    if config.held_out < 1:
        raise RunError("held_out is 0; a run is evaluated on at least 1 sample that it does not train on")
    parts = find_parts(config)
    output = RunFolder(config.output)
    data = find_data(config, earlier_run(output, config))
    config = as_begun(config, parts, data)
    if not ray.is_initialized():
        ray.init(log_to_driver=True)
    config = with_workers(config)
    scaling, nodes = placement(config), data_selector(config)
    owner = uuid.uuid4().hex
    claim(output, config, parts, data, owner)
    held_out = HeldOut(data.evaluated, parts.encoder(config), config.held_out, config.captions, config.workers, nodes)
    board = _board_here()
    with (
        tempfile.TemporaryDirectory(prefix="artemis-ray-train-", ignore_cleanup_errors=True) as unused,
        _shown_progress(board, config),
        _stop_on_sigterm(board),
    ):
        trainer = TorchTrainer(
            train_worker,
            train_loop_config={"job": Job(config, data, held_out, board, owner)},
            scaling_config=scaling,
            run_config=RunConfig(
                name=f"artemis-{owner[:8]}",
                storage_path=unused,
                failure_config=FailureConfig(max_failures=-1),  # the ranks count them, see `_begin`
            ),
        )
        outcome = _outcome(trainer)
    if outcome.get("error"):
        raise RunError(outcome["error"])
    if outcome.get("stopped"):
        raise RunError(f"stopped at step {outcome['step']} of {config.steps}; the same command continues from there")
    for name in (METRICS_FILE, CAPTIONS_FILE, report.REPORT_FILE, report.CURVE_FILE):
        output.pull(name)
    return output.path


def as_begun(config: TrainConfig, parts: Parts, data: Data) -> TrainConfig:
    """The configuration, `auto` being the dtype that the run computes in so far: on another CPU it might be another.

    Refuses before it takes the output over what the ranks would refuse: a job that runs there goes on.

    Raises:
        RunError: the newest checkpoint is of other weights, or computes in another dtype.
    """
    newest = _store(config).newest()
    if newest is None:
        return config
    if config.dtype == "auto":
        config = replace(config, dtype=newest.state["dtype"])
        print(f"going on in {config.dtype}, in which the run began", flush=True)
    align.check_continues(newest, config.fingerprint() | _inputs(data, graft.manifest_of(parts.sources)), config.dtype)
    return config


def _inputs(data: Data, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What a run reads, by its content."""
    return data.identity() | {"frozen_weights": graft.frozen_digest(manifest)}


def _store(config: TrainConfig) -> CheckpointStore:
    return CheckpointStore(f"{config.output.rstrip('/')}/checkpoints", config.keep)


def _outcome(trainer: TorchTrainer) -> dict[str, Any]:
    try:
        return trainer.fit().return_value or {}
    except TrainingFailedError as error:
        raise RunError(f"Ray Train gave up: {error}") from error


def _board_here() -> Any:
    """The board lives on the driver's node: the run outlives the loss of any other."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return Board.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]


@ray.remote(num_cpus=0)
class Board:
    """Between driver and ranks: records, the wish to stop, and how often the ranks began in vain."""

    def __init__(self) -> None:
        self._records: list[dict[str, Any]] = []
        self._stopping = asyncio.Event()
        self._begun = False
        self._starts: dict[int, int] = {}
        self._failure = "a worker died"

    async def post(self, record: dict[str, Any]) -> None:
        self._records.append(record)

    async def take(self) -> list[dict[str, Any]]:
        records, self._records = self._records, []
        return records

    async def stop(self) -> bool:
        """Wishes the run to stop; whether any rank has begun, and so will."""
        self._stopping.set()
        return self._begun

    async def stopping(self) -> None:
        """Returns when the run is to stop."""
        await self._stopping.wait()

    async def begin(self, rank: int) -> tuple[int, str]:
        """How often the rank has begun since the last checkpoint, and how its last attempt ended."""
        self._begun = True
        self._starts[rank] = self._starts.get(rank, 0) + 1
        failure, self._failure = self._failure, "a worker died"
        return self._starts[rank], failure

    async def saved(self) -> None:
        self._starts.clear()

    async def failed(self, error: str) -> None:
        self._failure = error


@contextmanager
def _shown_progress(board: Any, config: TrainConfig) -> Iterator[None]:
    """Prints a line of progress every few seconds while the run goes on."""
    done = threading.Event()

    def show() -> None:
        while not done.wait(3.0):
            _show(ray.get(board.take.remote()))

    def _show(records: list[dict[str, Any]]) -> None:
        for record in records:
            if "message" in record:
                print(record["message"], flush=True)
            elif "eval_loss" in record:
                print(f"  eval loss {record['eval_loss']:.4f} at step {record['step']}", flush=True)
        if steps := [r for r in records if "loss" in r]:
            print(progress_line(steps, config), flush=True)

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        _show(ray.get(board.take.remote()))


def progress_line(records: Sequence[dict[str, Any]], config: TrainConfig) -> str:
    """A bar, and the newest loss, rate, data wait and time left."""
    newest = records[-1]
    step, rate = newest["step"], sum(r["samples_per_s"] for r in records) / len(records)
    filled = round(24 * step / config.steps)
    left = (config.steps - step) * config.batch_size / rate
    return (
        f"[{'=' * filled}{' ' * (24 - filled)}] {step}/{config.steps}  loss {newest['loss']:.4f}  {rate:.2f} samples/s  "
        f"data wait {newest['data_wait']:.1%}  {report.duration(left)} left"
    )


@contextmanager
def _stop_on_sigterm(board: Any) -> Iterator[None]:
    """`ray job stop` and pre-emption send SIGTERM: the ranks abandon the step they are in, and save.

    Before there are any, the driver ends: Ray may be waiting for their CPUs, for ever.
    """

    early = False

    def ask(*_: Any) -> None:
        nonlocal early
        if early := not ray.get(board.stop.remote()):
            raise KeyboardInterrupt  # all that interrupts `ray.get`
        print("SIGTERM: saving a checkpoint, then stopping", flush=True)

    before = signal.signal(signal.SIGTERM, ask)
    try:
        yield
    except KeyboardInterrupt as error:
        if not early:
            raise
        raise RunError("stopped before any worker had begun; the same command starts the run") from error
    finally:
        signal.signal(signal.SIGTERM, before)


# --- a rank ----------------------------------------------------------------------------------------------------------


def train_worker(config: dict[str, Job]) -> dict[str, Any]:
    """One rank, under Ray Train. A RunError, which every rank meets alike, is returned, so that Ray does not retry it."""
    job = config["job"]
    try:
        _begin(job)
        return _train(job)
    except ArtemisError as error:
        if isinstance(error, RunError) or job.config.workers == 1:
            return {"error": str(error)}
        ray.get(job.board.failed.remote(str(error)))
        raise
    except Exception as error:
        ray.get(job.board.failed.remote(repr(error)))
        raise


def _begin(job: Job) -> None:
    """Lets Ray restart failed ranks for as long as they get on: a run of days may lose many a worker."""
    starts, failure = ray.get(job.board.begin.remote(ray.train.get_context().get_world_rank()))
    if starts > MAX_FAILURES + 1:
        raise RunError(
            f"the workers failed {starts - 1} times in a row without one checkpoint more, the last time: {failure}; "
            "Ray's logs of them have the rest"
        )


def _train(job: Job) -> dict[str, Any]:
    config, context = job.config, ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    parts = find_parts(config)
    align.set_threads(config.threads, context.get_local_world_size())
    torch.manual_seed(config.seed)
    device = ray.train.torch.get_device()
    model = graft.load_frozen(parts.sources, config.torch_dtype(device), str(device))
    manifest = graft.manifest_of(parts.sources)
    graft.check_frozen(model, parts.sources, manifest)

    alignment = Alignment(model, parts.spec, config, _inputs(job.data, manifest))
    store = _store(config)
    resume(alignment, store)
    feeder = _from_rank_zero(
        lambda: start_feeder(config, job.data.source, parts.encoder(config), alignment.state, world, data_selector(config))
    )
    feed = RayFeed(find_feeder(feeder), rank)
    stop = _stop_when_told(job.board)
    on_saved = job.board.saved.remote
    desk = (
        Desk(config, parts, alignment, store, job.held_out.shown, owner=job.owner, on_saved=on_saved, on_error=stop.set)
        if rank == 0
        else None
    )

    gauges = _gauges()

    def on_record(record: dict[str, Any]) -> None:
        if desk:
            desk.record(record)
            job.board.post.remote(record)
            for name in gauges.keys() & record.keys():
                gauges[name].set(float(record[name]))

    try:
        for _ in align.run(
            alignment,
            feed,
            lambda: job.held_out.share(rank),
            on_record=on_record,
            save=desk.save if desk else lambda _: None,
            stopping=stop.is_set,
        ):
            pass
        stopped = alignment.step < config.steps or alignment.evaluation_due
        if not stopped:
            graft.check_frozen(model, parts.sources, manifest)
            if desk:
                desk.finish()
    finally:
        feed.close()
        if desk:
            desk.close()
    return {"step": alignment.step, "stopped": stopped}


def _gauges() -> dict[str, Gauge]:
    """What Ray's dashboard and Prometheus see of the newest step."""
    names = ("loss", "eval_loss", "lr", "grad_norm", "samples_per_s", "tokens_per_s", "data_wait", "step", "skipped")
    return {name: Gauge(f"artemis_train_{name}", description=f"{name} of the newest training step") for name in names}


def _from_rank_zero(find: Callable[[], T]) -> T:
    """What rank 0 finds, on every rank; a RunError that it meets is met by all."""
    found: tuple[T | None, str] | None = None
    if ray.train.get_context().get_world_rank() == 0:
        try:
            found = find(), ""
        except RunError as error:
            found = None, str(error)
    value, sentence = broadcast_from_rank_zero(found)
    if sentence:
        raise RunError(sentence)
    return value  # type: ignore[no-any-return]


def resume(alignment: Alignment, store: CheckpointStore) -> None:
    """Takes up rank 0's newest whole checkpoint, on every rank the same."""

    def newest_step() -> int | None:
        newest = store.newest()
        return newest.step if newest else None

    step = _from_rank_zero(newest_step)
    if step is not None:
        alignment.restore(store.read(step))


def _stop_when_told(board: Any) -> threading.Event:
    """An event that is set as soon as the driver wants the run to stop."""
    stop = threading.Event()

    def watch() -> None:
        try:
            ray.get(board.stopping.remote())
        except RayError:  # the driver is gone, and this process goes with it
            return
        stop.set()

    threading.Thread(target=watch, name="stop-watch", daemon=True).start()
    return stop
