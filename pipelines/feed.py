"""The training stream on Ray Data, and the actor that deals its steps to the ranks.

One ordered plan an epoch: a read task a shard, parallel actors that decode and tokenize, blocks bounded in bytes. One
`Feeder` consumes it, cuts global batches, splits them, and keeps a few ready, so that ranks never wait for a decode
and any number of them sees the same steps.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray
import ray.data
from ray.data import ActorPoolStrategy, DataContext, Datasource, ExecutionResources, ReadTask
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data.block import BlockMetadata
from ray.exceptions import RayTaskError

from artemis_vlm import LIGHT
from artemis_vlm.errors import RunError
from artemis_vlm.examples import Example
from pipelines.data import (
    Candidate,
    Counts,
    DataEnded,
    Encoder,
    Position,
    Source,
    Step,
    Turn,
    batches,
    check_not_empty,
    first_examples,
    never,
    position_from,
    position_json,
    split,
)
from pipelines.shards import RawSample, Shard

if TYPE_CHECKING:
    from pipelines.recipe import TrainConfig

Row = tuple[Any, ...]
T = TypeVar("T")

#: Of every block in the plan: what memory, and how far the stream runs ahead, is counted in.
BLOCK_BYTES: Final = 4 << 20
#: How far the stream may run ahead of the training, in all: half a minute of 512x512 images on an H100.
AHEAD_BYTES: Final = 1 << 30
#: Shards open at once: the one being read and the next.
OPEN_SHARDS: Final = 2
#: Shards in one plan, over as many epochs as that takes. The next plan costs the seconds in which its actors start.
PLAN_TURNS: Final = 256
#: Steps ready for the ranks.
STEPS_READY: Final = 4
#: Between two turns of Ray Data's loop.
LOOP_PAUSE_S: Final = 0.02
#: Of the processes that read, decode and deal. They need neither torch nor the model's classes, whose import would take
#: three quarters of their start; what a feeder starts has it too.
DATA_ONLY: Final = {"env_vars": {LIGHT: "1"}}
#: In place of a row: reading ended here, `error` says why.
END: Final = -1

_PLACE: Final = {"epoch": pa.int64(), "rank": pa.int64(), "row": pa.int64(), "uid": pa.string(), "error": pa.string()}
RAW_SCHEMA: Final = pa.schema(_PLACE | {"image": pa.large_binary(), "text": pa.large_binary()})
ENCODED_SCHEMA: Final = pa.schema(
    _PLACE
    | {
        "input_ids": pa.large_binary(),
        "n_prompt": pa.int64(),
        "patches": pa.large_binary(),
        "grid_h": pa.int64(),
        "grid_w": pa.int64(),
    }
)


class ShardSource(Datasource):  # type: ignore[misc]
    """Shards, a read task each, in their order; a shard is opened when its task runs.

    reads: what reads each, sent to where its task runs
    """

    def __init__(self, reads: Sequence[Callable[[], Iterator[pa.Table]]]) -> None:
        super().__init__()
        self.reads = reads

    def get_name(self) -> str:
        return "Shards"

    def estimate_inmemory_data_size(self) -> int | None:
        return None  # only reading would tell

    def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
        unknown = BlockMetadata(num_rows=None, size_bytes=None, exec_stats=None)
        return [ReadTask(read, unknown) for read in self.reads]


def read_blocks(turn: Turn, block_bytes: int) -> Iterator[pa.Table]:
    """One shard's samples in their order, in blocks of bounded size.

    A shard that cannot be read is told in its place in the stream: raised here, it would overtake the samples before it.
    """
    return in_blocks(_raw_rows(turn), RAW_SCHEMA, block_bytes)


def _raw_rows(turn: Turn) -> Iterator[Row]:
    try:
        for after, raw in turn.read():
            yield (after.epoch, after.shard, after.row, raw.uid, raw.error, raw.image, raw.text)
    except RunError as error:
        yield (turn.epoch, turn.rank, END, "", str(error), b"", b"")


def in_blocks(rows: Iterable[Row], schema: pa.Schema, block_bytes: int, row_bytes: int = 0) -> Iterator[pa.Table]:
    """Rows as tables, each closed by the row that brings its binary data to `block_bytes`.

    Args:
        row_bytes: what a row counts for at least.
    """

    def size(row: Row) -> int:
        return max(row_bytes, sum(_size(value) for value in row if not isinstance(value, (int, str))))

    for held in by_bytes(rows, size, block_bytes):
        yield _table(held, schema)


def by_bytes(items: Iterable[T], size: Callable[[T], int], at_least: int) -> Iterator[list[T]]:
    """Items in lists, each closed by the one that brings it to so many bytes."""
    held: list[T] = []
    total = 0
    for item in items:
        held.append(item)
        total += size(item)
        if total >= at_least:
            yield held
            held, total = [], 0
    if held:
        yield held


def _table(rows: Sequence[Row], schema: pa.Schema) -> pa.Table:
    columns = [
        _binary_array(column) if field.type == pa.large_binary() else pa.array(column, field.type)
        for field, column in zip(schema, zip(*rows))
    ]
    return pa.Table.from_arrays(columns, schema=schema)


def _binary_array(values: Sequence[bytes | npt.NDArray[Any] | None]) -> pa.Array:
    """What `pa.array` makes of bytes, from arrays too and in one copy; None becomes empty."""
    offsets = np.zeros(len(values) + 1, np.int64)
    np.cumsum([_size(value) for value in values], out=offsets[1:])
    parts = [np.frombuffer(value, np.uint8) for value in values if value is not None]
    data = np.concatenate([*parts, np.empty(0, np.uint8)])
    return pa.LargeBinaryArray.from_buffers(
        pa.large_binary(), len(values), [None, pa.py_buffer(offsets), pa.py_buffer(data)]
    )


def _size(value: bytes | npt.NDArray[Any] | None) -> int:
    return 0 if value is None else len(value) if isinstance(value, bytes) else value.nbytes


class Encode:
    """The actor of the encoding stage."""

    def __init__(self, encoder: Encoder, block_bytes: int) -> None:
        self.encoder, self.block_bytes = encoder, block_bytes

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        return in_blocks(self._rows(table), ENCODED_SCHEMA, self.block_bytes)

    def _rows(self, table: pa.Table) -> Iterator[Row]:
        samples = [
            (Position(row["epoch"], row["rank"], row["row"]), RawSample(row["uid"], row["image"], row["text"], row["error"]))
            for row in table.to_pylist()
        ]
        for candidate in self.encoder.candidates(samples):
            after, example = candidate.after, candidate.example
            place = (after.epoch, after.shard, after.row, candidate.uid, candidate.error)
            if example is None:
                yield (*place, None, 0, None, 0, 0)
            else:
                yield (*place, example.input_ids, example.n_prompt, example.patches, *example.grid)


def whole(column: pa.ChunkedArray) -> pa.Array:
    """A column as one array, without a copy where it is one already."""
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def decode_rows(table: pa.Table) -> Iterator[Candidate]:
    """Candidates of an encoded block; pixels stay where Arrow put them.

    Raises:
        RunError: in its turn, what a shard could not be read for.
    """
    patches, ids = whole(table["patches"]), whole(table["input_ids"])
    small = table.drop_columns(["patches", "input_ids"]).to_pylist()
    for i, row in enumerate(small):
        if row["row"] == END:
            raise RunError(row["error"])
        after = Position(row["epoch"], row["rank"], row["row"])
        if row["error"]:
            yield Candidate(after, row["uid"], None, row["error"])
            continue
        grid = row["grid_h"], row["grid_w"]
        pixels = np.frombuffer(patches[i].as_buffer(), np.uint8).reshape(grid[0] * grid[1], -1)
        tokens = np.frombuffer(ids[i].as_buffer(), np.int32)
        yield Candidate(after, row["uid"], Example(row["uid"], tokens, row["n_prompt"], pixels, grid))


def ray_candidates(
    source: Source,
    encoder: Encoder,
    start: Position,
    decoders: int,
    decoder_cpus: int = 1,
    nodes: Mapping[str, str] | None = None,
) -> Iterator[Candidate]:
    """`data.candidates`, read and encoded by the cluster.

    Args:
        decoders: actors that decode.
        decoder_cpus: logical CPUs that each of them takes.
        nodes: label selector of the nodes to read and decode on; None: any.
    """
    turns = source.turns(start)
    empty_turns = 0
    while True:
        plan = list(itertools.islice(turns, PLAN_TURNS))
        empty_turns += len(plan)
        for table in _plan(plan, encoder, decoders, decoder_cpus, nodes).iter_batches(
            batch_size=None, batch_format="pyarrow", prefetch_batches=1
        ):
            yield from decode_rows(table)
            empty_turns = 0
        check_not_empty(source, empty_turns)


def _plan(
    turns: Sequence[Turn], encoder: Encoder, decoders: int, decoder_cpus: int, nodes: Mapping[str, str] | None
) -> ray.data.Dataset:
    context = DataContext.get_current()
    context.execution_options.preserve_order = True
    context.execution_options.resource_limits = ExecutionResources.for_limits(object_store_memory=AHEAD_BYTES)
    context.target_max_block_size = BLOCK_BYTES
    context.enable_progress_bars = False
    context.custom_execution_callback_classes = [Breather]
    where = {"label_selector": dict(nodes)} if nodes else {}
    dataset = ray.data.read_datasource(
        ShardSource([partial(read_blocks, turn, BLOCK_BYTES) for turn in turns]),
        concurrency=min(OPEN_SHARDS, len(turns)),
        override_num_blocks=len(turns),
        num_cpus=0,  # it mostly waits
        ray_remote_args=where,
    )
    return dataset.map_batches(
        Encode,
        fn_constructor_args=(encoder, BLOCK_BYTES),
        batch_size=None,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(size=decoders),
        num_cpus=decoder_cpus,
        zero_copy_batch=True,
        **where,
    )


def _hush_ray_data() -> None:
    """Ray Data warns of every stage that waits for its consumer; here all of them wait for the training, as they should."""
    for name in ("execution.streaming_executor", "execution.streaming_executor_state", "progress"):
        logging.getLogger(f"ray.data._internal.{name}").setLevel(logging.ERROR)


class Breather(ExecutionCallback):  # type: ignore[misc]
    """Lets Ray Data's loop rest: while finished blocks wait for the training, it would turn as fast as it can.

    That took 63 % of a core. Each turn moves every block that is ready, so the pause bounds no rate that training has.
    """

    def on_execution_step(self, executor: Any) -> None:
        time.sleep(LOOP_PAUSE_S)


class Feeder:
    """Owns the stream and deals steps: `get(rank, n)` is rank's share of the n-th step since the start."""

    def __init__(
        self,
        batch_size: int,
        max_bad_share: float,
        source: Source,
        encoder: Encoder,
        state: Mapping[str, Any],
        ranks: int,
        decoders: int,
        decoder_cpus: int,
        nodes: Mapping[str, str] | None,
    ) -> None:
        _hush_ray_data()
        self.ranks, self.micro_tokens = ranks, state["micro_tokens"]
        stream = ray_candidates(source, encoder, position_from(state["position"]), decoders, decoder_cpus, nodes)
        self._batches = batches(stream, batch_size, Counts(**state["counts"]), max_bad_share)
        self._steps: deque[list[Step | None]] = deque()
        self._first = 0  # number of the oldest step kept
        self._error: Exception | None = None
        self._changed = threading.Condition()
        threading.Thread(target=self._fill, daemon=True).start()

    def _fill(self) -> None:
        try:
            for batch in self._batches:
                step = self._deal(batch)
                with self._changed:
                    self._changed.wait_for(lambda: len(self._steps) < STEPS_READY)
                    self._steps.append(step)
                    self._changed.notify_all()
        except Exception as error:  # handed to every rank
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _deal(self, batch: Any) -> list[Step | None]:
        shares = split(batch.examples, self.ranks, self.micro_tokens)
        n_targets, uids = sum(e.n_targets for e in batch.examples), [e.uid for e in batch.examples]
        common = (n_targets, uids, position_json(batch.position), asdict(batch.counts), batch.quarantined)
        return [Step(share, *common) for share in shares]

    def get(self, rank: int, number: int) -> Step | DataEnded:
        """Waits for the step, or for the end of the data.

        Raises:
            RuntimeError: what reads the data broke down. Not the data's fault: starting again may help.
        """
        with self._changed:
            self._changed.wait_for(lambda: number < self._first + len(self._steps) or self._error is not None)
            if number >= self._first + len(self._steps):
                if isinstance(self._error, DataEnded):
                    return self._error
                raise RuntimeError(f"reading the data failed: {self._error!r}")
            shares = self._steps[number - self._first] if number >= self._first else [None] * self.ranks
            step, shares[rank] = shares[rank], None
            if step is None:
                raise RuntimeError(f"rank {rank} asked for step {number} twice")
            while self._steps and not any(self._steps[0]):
                self._steps.popleft()
                self._first += 1
            self._changed.notify_all()
            return step


class RayFeed:
    """One rank's end of a `Feeder`: asks for the next step while the last is computed."""

    def __init__(self, feeder: Any, rank: int) -> None:
        self.feeder, self.rank = feeder, rank
        self._asked = 0
        self._replies: deque[Any] = deque()
        self._ask()
        self._ask()

    def _ask(self) -> None:
        self._replies.append(self.feeder.get.remote(self.rank, self._asked))
        self._asked += 1

    def next(self, stopping: Callable[[], bool] = never) -> Step | None:
        """The next step; None if `stopping` came true before there was one.

        Raises:
            DataEnded: there will be none; every rank is told at the same step.
        """
        while not ray.wait([self._replies[0]], timeout=0.5)[0]:
            if stopping():
                return None
        reply = ray.get(self._replies.popleft())
        if isinstance(reply, DataEnded):
            raise reply
        self._ask()
        return reply  # type: ignore[no-any-return]

    def close(self) -> None:
        """Ends the feeder, once for all ranks."""
        if self.rank == 0:
            ray.kill(self.feeder)


class HeldOut:
    """The samples to evaluate on, read and decoded once, on the cluster, while training starts."""

    def __init__(
        self, shards: Sequence[Shard], encoder: Encoder, count: int, shown: int, ranks: int, nodes: Mapping[str, str] | None
    ) -> None:
        """
        Args:
            count: the first samples of the shards, in file order.
            shown: how many of them also go to the captions of the report.
        """
        where = {"label_selector": dict(nodes)} if nodes else {}
        task = ray.remote(_held_out).options(num_returns=ranks + 1, num_cpus=0, runtime_env=DATA_ONLY, **where)
        *self._shares, self._shown = task.remote(shards, encoder, count, shown, ranks)

    def share(self, rank: int) -> list[Example]:
        """Raises RunError if none of the samples is usable, or their shards cannot be read."""
        return _result(self._shares[rank])

    def shown(self) -> list[Example]:
        return _result(self._shown)


def _held_out(shards: Sequence[Shard], encoder: Encoder, count: int, shown: int, ranks: int) -> list[list[Example]]:
    examples = first_examples(shards, encoder, count)
    return [*(examples[rank::ranks] for rank in range(ranks)), examples[:shown]]


def _result(reference: Any) -> list[Example]:
    try:
        return ray.get(reference)  # type: ignore[no-any-return]
    except RayTaskError as error:
        raise error.cause from None


def start_feeder(
    config: TrainConfig,
    source: Source,
    encoder: Encoder,
    state: Mapping[str, Any],
    ranks: int,
    nodes: Mapping[str, str] | None,
) -> str:
    """Starts a feeder that lives as long as this process wants it; returns its name, for the other ranks."""
    name = f"feeder-{uuid.uuid4().hex}"
    decoders, cpus = _decoders(config.decode_workers, ranks, nodes)
    options = {"name": name, "num_cpus": 0, "max_concurrency": 4 * ranks + 2, "runtime_env": DATA_ONLY}
    handle = (
        ray.remote(Feeder)
        .options(**options)
        .remote(config.batch_size, config.max_bad_share, source, encoder, state, ranks, decoders, cpus, nodes)
    )
    _OWNED.append(handle)
    return name


#: Handles that keep this process's feeders alive: an actor goes with the last handle of the process that made it.
_OWNED: list[Any] = []


def _decoders(wanted: int, ranks: int, nodes: Mapping[str, str] | None) -> tuple[int, int]:
    """How many actors decode, and the logical CPUs that each asks for: none where they would wait for one for ever."""
    cpus = sum(
        n["Resources"].get("CPU", 0) for n in ray.nodes() if n["Alive"] and _selected(n.get("Labels", {}), nodes or {})
    )
    free = int(cpus) if nodes else int(cpus) - ranks
    decoders = wanted or max(1, free - 2)
    return decoders, 1 if decoders <= free else 0


def _selected(labels: Mapping[str, str], selector: Mapping[str, str]) -> bool:
    """Ray's rule for `value` and `!value`."""
    return all((labels.get(key) == value.removeprefix("!")) != value.startswith("!") for key, value in selector.items())


def find_feeder(name: str, timeout_s: float = 60.0) -> Any:
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return ray.get_actor(name)
        except ValueError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
