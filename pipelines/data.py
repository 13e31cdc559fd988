"""Shards to training steps: the order, the position in it, the encoding, the batching. Knows nothing of Ray.

    shards --order--> raw samples --Encoder--> candidates --batches--> global batches --split--> ranks, micro-batches

The order is a pure function of (shard names, seed, epoch): names permuted, rows shuffled within a shard, no shard
opened before its turn. `pipelines.feed` runs the same functions in a Ray Data plan; here they run in this process.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from artemis_vlm.chat import CaptionFrame
from artemis_vlm.errors import RunError, SampleError
from artemis_vlm.examples import Example, split_by_tokens
from artemis_vlm.image import ImageSpec, decode_image, patchify
from pipelines.shards import RawSample, Shard, find_shards, open_rows

logger = logging.getLogger(__name__)
# A process encodes on the core it was given; tokenizers would start a thread for each that the machine has.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

#: Unusable samples in a row that stop a run.
MAX_BAD_IN_A_ROW: Final = 100
#: Samples seen before the share of unusable ones counts.
MIN_SEEN: Final = 1000


@dataclass(frozen=True, slots=True)
class Position:
    """Of the next candidate: epoch, rank of its shard in the permuted order, rank of its row in the shuffled order."""

    epoch: int = 0
    shard: int = 0
    row: int = 0


@dataclass(frozen=True, slots=True)
class Candidate:
    """One sample in its turn: an example, or the reason why there is none; `after` is the position behind it."""

    after: Position
    uid: str
    example: Example | None
    error: str = ""


# --- the order -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Turn:
    """One shard's turn: all that reading it takes, and little to send around.

    rank: of the shard in its epoch's order; start_row: rank of the first row to read, in its shuffled order
    held_out: rows at the start of the file that are left out
    """

    shard: Shard
    seed: int
    epoch: int
    rank: int
    start_row: int = 0
    held_out: int = 0

    def read(self) -> Iterator[tuple[Position, RawSample]]:
        """The samples in their order, each with the position behind it."""
        with open_rows(self.shard) as rows:
            kept = np.arange(self.held_out, len(rows))
            order = kept[permutation(len(kept), self.seed, self.epoch, self.shard.name)]
            for row in range(self.start_row, len(order)):
                yield Position(self.epoch, self.rank, row + 1), rows[int(order[row])]


@dataclass(frozen=True)
class Source:
    """A run's training data: the shards, the seed of their order, and how many first rows of a shard are held out."""

    shards: Sequence[Shard]
    seed: int
    held_out: Mapping[str, int] = field(default_factory=dict)

    def order(self, epoch: int) -> list[Shard]:
        """The shards as this epoch takes them."""
        return [self.shards[i] for i in permutation(len(self.shards), self.seed, epoch)]

    def turns(self, start: Position) -> Iterator[Turn]:
        """The turns from a position on, epoch after epoch, endlessly."""
        for epoch in itertools.count(start.epoch):
            for rank, shard in enumerate(self.order(epoch)):
                if (epoch, rank) >= (start.epoch, start.shard):
                    row = start.row if (epoch, rank) == (start.epoch, start.shard) else 0
                    yield Turn(shard, self.seed, epoch, rank, row, self.held_out.get(shard.name, 0))


def permutation(count: int, seed: int, epoch: int, name: str = "") -> npt.NDArray[np.int64]:
    """An order of `count` things, int64 (count,), that depends on the arguments alone.

    Ranks random words itself: numpy keeps a bit generator's words the same for ever, but not what `Generator` makes of
    them, and a run may outlive a version of numpy.
    """
    digest = hashlib.sha256(f"{seed}/{epoch}/{name}".encode()).digest()
    words = np.random.PCG64(int.from_bytes(digest[:16], "big")).random_raw(count)
    return np.argsort(words, kind="stable")


def find_source(uri: str, seed: int, held_out: int, known: Mapping[str, int] | None = None) -> Source:
    """The training data at a location without its first `held_out` samples; opens just the shards that hold those.

    Args:
        known: rows held out of each shard, where an earlier start of the run has counted them: nothing is opened.

    Raises:
        RunError: no data, or not more than is held out.
    """
    shards = find_shards(uri)
    if known is not None:
        return Source(shards, seed, known)
    held: dict[str, int] = {}
    missing, left = held_out, len(shards)
    for shard in shards:
        if not missing:
            break
        with open_rows(shard) as rows:
            held[shard.name] = min(missing, len(rows))
            left -= held[shard.name] == len(rows)
        missing -= held[shard.name]
    if missing or not left:
        raise RunError(f"the data {uri} has {held_out - missing} samples; {held_out} are to be held out and more trained on")
    return Source(shards, seed, held)


# --- encoding --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Encoder:
    """Raw samples to examples: the pixel path and the prompt path of training."""

    spec: ImageSpec
    tokenizer: PreTrainedTokenizerBase
    frame: CaptionFrame
    max_tokens: int

    def candidate(self, after: Position, raw: RawSample) -> Candidate:
        (candidate,) = self.candidates([(after, raw)])
        return candidate

    def candidates(self, samples: Sequence[tuple[Position, RawSample]]) -> Iterator[Candidate]:
        """All captions, then each image: in turns, vocabulary and pixels would drive each other out of the CPU's cache."""
        texts = [self._text(raw) for _, raw in samples]
        encoded = iter(self.frame.captions(self.tokenizer, [text for text in texts if isinstance(text, str)]))
        captions = [next(encoded) if isinstance(text, str) else text for text in texts]
        for (after, raw), caption in zip(samples, captions):
            try:
                yield Candidate(after, raw.uid, self._example(raw, caption))
            except SampleError as error:
                yield Candidate(after, raw.uid, None, str(error))

    def _text(self, raw: RawSample) -> str | SampleError:
        if raw.error:
            return SampleError(raw.error)
        try:
            text = raw.text.decode().strip()
        except UnicodeDecodeError as error:
            return SampleError(f"the caption is not UTF-8 (byte {error.start})")
        return text or SampleError("the caption is empty")

    def _example(self, raw: RawSample, caption: list[int] | SampleError) -> Example:
        if isinstance(caption, SampleError):
            raise caption
        patches = patchify(decode_image(raw.image), self.spec)
        prompt = self.frame.prompt(self.spec.tokens(patches.grid))
        if (total := len(prompt) + len(caption)) > self.max_tokens:
            raise SampleError(f"the sample has {total} tokens; the limit is {self.max_tokens}")
        return Example(raw.uid, np.array(prompt + caption, np.int32), len(prompt), patches.pixels, patches.grid)


def candidates(source: Source, encoder: Encoder, start: Position) -> Iterator[Candidate]:
    """The endless stream from a position on, epoch after epoch, read and encoded in this process.

    Raises:
        RunError: a shard cannot be read, or none has a sample.
    """
    empty_turns = 0
    for turn in source.turns(start):
        empty_turns += 1
        for after, raw in turn.read():
            yield encoder.candidate(after, raw)
            empty_turns = 0
        check_not_empty(source, empty_turns)


def check_not_empty(source: Source, empty_turns: int) -> None:
    """Ends a stream that would look for samples for ever."""
    if empty_turns > len(source.shards):
        raise RunError(f"the {len(source.shards)} shards hold no samples beside the held-out ones")


def first_examples(shards: Sequence[Shard], encoder: Encoder, count: int) -> list[Example]:
    """The first `count` samples in file order: the held-out set. Unusable ones are logged and left out."""
    found: list[Example] = []
    remaining = count
    for shard in shards:
        with open_rows(shard) as rows:
            for index in range(min(remaining, len(rows))):
                candidate = encoder.candidate(Position(), rows[index])
                if candidate.example is None:
                    logger.warning("held-out sample %s is unusable: %s", candidate.uid, candidate.error)
                else:
                    found.append(candidate.example)
            remaining -= min(remaining, len(rows))
        if not remaining:
            break
    if not found:
        raise RunError(f"the data from {shards[0].uri} on has no usable sample to evaluate on")
    if remaining:
        logger.warning("%d samples are evaluated on: the data from %s on has no %d", len(found), shards[0].uri, count)
    return found


# --- batching --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Counts:
    """Samples since the run began; seen = used + quarantined, always."""

    seen: int = 0
    used: int = 0
    quarantined: int = 0


class DataEnded(RunError):
    """The stream cannot fill another step; `quarantined`: (uid, reason) of what it passed over since the last one."""

    def __init__(self, sentence: str, quarantined: Sequence[tuple[str, str]] = ()) -> None:
        super().__init__(sentence)
        self.quarantined = list(quarantined)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.quarantined)


@dataclass(frozen=True, slots=True)
class GlobalBatch:
    """The samples of one step, the position behind the last candidate taken for it, and what was passed over."""

    examples: Sequence[Example]
    position: Position
    counts: Counts
    quarantined: Sequence[tuple[str, str]]


def batches(
    stream: Iterable[Candidate], batch_size: int, counts: Counts = Counts(), max_bad_share: float = 0.01
) -> Iterator[GlobalBatch]:
    """Takes the next `batch_size` usable samples, again and again.

    Raises:
        DataEnded: a shard cannot be read, or too many samples are unusable, in a row or in all; the text has the last
            reasons.
    """
    examples: list[Example] = []
    bad: list[tuple[str, str]] = []
    in_a_row = 0
    try:
        for candidate in stream:
            if candidate.example is not None:
                examples.append(candidate.example)
                counts = Counts(counts.seen + 1, counts.used + 1, counts.quarantined)
                in_a_row = 0
            else:
                bad.append((candidate.uid, candidate.error))
                counts = Counts(counts.seen + 1, counts.used, counts.quarantined + 1)
                in_a_row += 1
                _check_quarantine(counts, in_a_row, max_bad_share, bad)
            if len(examples) == batch_size:
                yield GlobalBatch(examples, candidate.after, counts, bad)
                examples, bad = [], []
    except RunError as error:
        raise DataEnded(str(error), bad) from error


def _check_quarantine(counts: Counts, in_a_row: int, limit: float, bad: Sequence[tuple[str, str]]) -> None:
    reasons = "; ".join(f"{uid}: {error}" for uid, error in bad[-3:])
    if in_a_row >= MAX_BAD_IN_A_ROW:
        raise RunError(f"{in_a_row} samples in a row were unusable, the last {reasons}; check the data")
    if counts.seen >= MIN_SEEN and counts.quarantined > limit * counts.seen:
        share = counts.quarantined / counts.seen
        raise RunError(
            f"{counts.quarantined} of {counts.seen} samples ({share:.1%}) were unusable, more than {limit:.1%}, the last "
            f"{reasons}; check the data, or raise --max-bad-share"
        )


def split(examples: Sequence[Example], ranks: int, micro_tokens: int) -> list[list[list[Example]]]:
    """A global batch as micro-batches for each rank: ranks near-equal in tokens, several samples never above the budget."""
    lengths = [e.n_tokens for e in examples]
    return [
        [[examples[share[i]] for i in group] for group in _within([lengths[i] for i in share], micro_tokens)]
        for share in split_by_tokens(lengths, ranks)
    ]


def _within(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices in the fewest near-equal groups that keep the budget, where more than one sample is in them."""
    parts = math.ceil(sum(lengths) / budget)
    while True:
        groups = split_by_tokens(lengths, parts)
        if all(len(group) == 1 or sum(lengths[i] for i in group) <= budget for group in groups):
            return groups
        parts += 1


def position_from(state: Mapping[str, Any] | None) -> Position:
    return Position(**state) if state else Position()


def position_json(position: Position) -> dict[str, int]:
    return asdict(position)


# --- steps ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Step:
    """What one rank does in one step.

    micro_batches: this rank's share of the step's samples
    n_targets, uids: of the whole step, over all ranks
    position: where the data stream stands after this step, as JSON
    counts: seen, used and quarantined samples since the run began
    quarantined: (uid, reason) of the samples passed over for this step
    """

    micro_batches: Sequence[Sequence[Example]]
    n_targets: int
    uids: Sequence[str]
    position: Mapping[str, Any]
    counts: Mapping[str, int]
    quarantined: Sequence[tuple[str, str]] = ()


class Feed(Protocol):
    """Anything that hands out steps in order."""

    def next(self, stopping: Callable[[], bool], /) -> Step | None:
        """The next step; None if `stopping` came true before there was one.

        Raises:
            DataEnded: there will be none; every rank is told at the same step.
        """


def never() -> bool:
    return False
