"""The training stream through Ray: the same candidates, steps and errors as in one process, whatever decodes them."""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import ray
from ray._private.state import actors
from samples import caption_encoder, content, jpeg, sample, write_shards, write_tar
from transformers import PreTrainedTokenizerBase

from artemis_vlm import RunError
from pipelines import data, feed
from pipelines.data import Candidate, Encoder, Position, Source, Step, Turn
from pipelines.recipe import TrainConfig
from pipelines.shards import RawSample

CONFIG = TrainConfig(samples=100, held_out=0, batch_size=6, micro_tokens=150, decode_workers=1)
NEW = {"position": None, "counts": {}, "micro_tokens": CONFIG.micro_tokens}


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    here = Path(__file__).parent
    with pytest.MonkeyPatch.context() as patch:  # workers take their environment from here
        patch.setenv("PYTHONPATH", f"{here.parent}:{here}")
        ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, configure_logging=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def encoder(tokenizer: PreTrainedTokenizerBase) -> Encoder:
    return caption_encoder(tokenizer)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """5 shards of 9 rows, one of them bad, and a shard cut off."""
    folder = write_shards(tmp_path_factory.mktemp("shards"), 5, 9)
    write_tar(folder / "sa_000001.tar", [*map(sample, range(8)), ("bad", {"jpg": jpeg()[:99], "txt": "a"})])
    cut = write_shards(tmp_path_factory.mktemp("cut"), 1, 9) / "sa_000000.tar"
    (folder / "sa_000009.tar").write_bytes(cut.read_bytes()[:9000])
    return data.find_source(str(folder), 3, 4)


class Jittery(Encoder):
    """Takes its time, now more, now less."""

    def candidates(self, samples: Sequence[tuple[Position, RawSample]]) -> Iterator[Candidate]:
        time.sleep(random.Random(samples[0][1].uid).random() * 0.2)
        yield from super().candidates(samples)


class Logged(Source):
    """Leaves a file beside each shard that is opened."""

    def turns(self, start: Position) -> Iterator[Turn]:
        for turn in super().turns(start):
            yield LoggedTurn(**{name: getattr(turn, name) for name in Turn.__slots__})


class LoggedTurn(Turn):
    def read(self) -> Iterator[tuple[Position, RawSample]]:
        Path(f"{self.shard.uri}.opened").touch()
        yield from super().read()


def through_ray(source: Source, encoder: Encoder, start: Position, count: int, decoders: int = 1) -> list[Candidate]:
    with closing(feed.ray_candidates(source, encoder, start, decoders)) as stream:
        return list(islice(stream, count))


def contents(stream: Iterable[Candidate], count: int) -> list[tuple[object, ...]]:
    return [content(c) for c in islice(stream, count)]


# --- candidates ------------------------------------------------------------------------------------------------------


def test_candidates_are_those_of_one_process_bit_for_bit(
    source: Source, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "BLOCK_BYTES", 4000)  # several to a shard
    monkeypatch.setattr(feed, "PLAN_TURNS", 7)  # the second plan begins within the second epoch
    epoch = len({raw.uid for turn in islice(source.turns(Position()), 6) for _, raw in turn.read()})
    reference = contents(data.candidates(source, encoder, Position()), epoch + 20)
    assert reference[epoch][0] == Position(1, 0, 1)
    assert sum(bool(c[2]) for c in reference[:epoch]) == 2
    slow = Jittery(**{name: getattr(encoder, name) for name in ("spec", "tokenizer", "frame", "max_tokens")})
    found = through_ray(source, slow, Position(), epoch + 20, decoders=2)
    assert [content(c) for c in found] == reference


def test_data_without_samples_ends_the_stream(tmp_path: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "PLAN_TURNS", 3)
    write_tar(tmp_path / "a.tar", [])
    write_tar(tmp_path / "b.tar", [])
    with pytest.raises(RunError, match="2 shards hold no samples"):
        through_ray(data.find_source(str(tmp_path), 0, 0), encoder, Position(), 1)


def test_blocks_are_bounded_in_bytes(source: Source, encoder: Encoder) -> None:
    largest = 64 * 64 * 3 + 2000  # a sample
    blocks = 0
    for turn in islice(source.turns(Position()), 6):
        raw = list(feed.read_blocks(turn, 3000))
        encoded = [table for block in raw for table in feed.Encode(encoder, 20_000)(block)]
        assert all(table.nbytes < 3000 + largest for table in raw)
        assert all(table.nbytes < 20_000 + largest for table in encoded)
        assert sum(map(len, encoded)) == sum(map(len, raw)) == sum(1 for _ in turn.read())
        blocks += len(raw)
    assert blocks > 12


def test_the_stream_stays_near_its_reader(tmp_path: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a bound far below the data: neither deadlock nor shards opened long before their turn."""
    monkeypatch.setattr(feed, "BLOCK_BYTES", 20_000)
    monkeypatch.setattr(feed, "AHEAD_BYTES", 400_000)
    found = data.find_source(str(write_shards(tmp_path, 40, 20)), 0, 0)  # 160 KB of patches a shard
    with closing(feed.ray_candidates(Logged(found.shards, 0), encoder, Position(), 1)) as stream:
        assert next(stream).after == Position(0, 0, 1)
        time.sleep(2)
        opened = {path.name.removesuffix(".opened") for path in tmp_path.glob("*.opened")}
        assert opened == {shard.name for shard in found.order(0)[: len(opened)]}
        assert len(opened) < 25  # 20 KB of JPEG each
        assert [c.after for c in islice(stream, 250)][-1] == Position(0, 12, 11)


# --- steps -----------------------------------------------------------------------------------------------------------


def start(
    source: Source, encoder: Encoder, ranks: int, state: dict[str, Any], config: TrainConfig = CONFIG
) -> list[feed.RayFeed]:
    name = feed.start_feeder(config, source, encoder, state, ranks, None)
    return [feed.RayFeed(feed.find_feeder(name), rank) for rank in range(ranks)]


def deal(feeds: list[feed.RayFeed], steps: int) -> list[list[Step]]:
    """Steps of all ranks, the last rank asking first."""
    dealt = []
    for _ in range(steps):
        dealt.append([each.next() for each in reversed(feeds)][::-1])
    return dealt


def samples_in(shares: list[Step]) -> list[bytes]:
    examples = [e for share in shares for part in share.micro_batches for e in part]
    return sorted(e.uid.encode() + e.input_ids.tobytes() + e.patches.tobytes() for e in examples)


def feeder_actors() -> list[str]:
    """Class names of live actors, but for those that Ray Data keeps for all its users."""
    alive = [a["ActorClassName"] for a in actors().values() if a["State"] != "DEAD"]
    return [name for name in alive if not name.startswith(("_", "Autoscaling", "ActorLocation"))]


def test_steps_are_those_of_one_process_and_nothing_outlives_them(source: Source, encoder: Encoder) -> None:
    steps = 10  # into the second epoch
    reference = list(islice(data.batches(data.candidates(source, encoder, Position()), 6, max_bad_share=1.0), steps))
    feeds = start(source, encoder, 1, NEW, replace(CONFIG, max_bad_share=1.0))
    for shares, batch in zip(deal(feeds, steps), reference, strict=True):
        whole = [Step([batch.examples], 0, (), {}, {})]
        assert samples_in(shares) == samples_in(whole)
        for share in shares:
            assert list(share.uids) == [e.uid for e in batch.examples]
            assert share.n_targets == sum(e.n_targets for e in batch.examples)
            assert share.position == asdict(batch.position)
            assert share.counts == asdict(batch.counts)
            assert list(share.quarantined) == list(batch.quarantined)
    assert reference[-1].position.epoch == 1

    feeds[0].close()
    deadline = time.monotonic() + 20
    while feeder_actors():
        assert time.monotonic() < deadline, feeder_actors()
        time.sleep(0.2)


def test_a_state_goes_on_and_every_rank_gets_the_sentence_at_the_same_step(tmp_path: Path, encoder: Encoder) -> None:
    source = data.find_source(str(write_shards(tmp_path, 3, 15)), 0, 0)
    Path(source.order(0)[2].uri).unlink()
    reference = list(islice(data.batches(data.candidates(source, encoder, Position()), 6), 5))
    state = {**NEW, "position": asdict(reference[1].position), "counts": asdict(reference[1].counts)}
    assert state["position"] == {"epoch": 0, "shard": 0, "row": 12}
    feeds = start(source, encoder, 2, state)
    for shares, batch in zip(deal(feeds, 3), reference[2:], strict=True):
        assert samples_in(shares) == samples_in([Step([batch.examples], 0, (), {}, {})])
        assert shares[0].counts == shares[1].counts == asdict(batch.counts)
    for each in feeds:
        with pytest.raises(RunError, match=r"^the shard .* is gone; bring it back, or start a new run without it$"):
            each.next()
    feeds[0].close()


def test_a_busy_cluster_is_fed_too(source: Source, encoder: Encoder) -> None:
    """Training processes and a job may hold every CPU there is: decoding then shares them instead of waiting for ever."""

    @ray.remote(num_cpus=4)
    class Busy:
        def ready(self) -> bool:
            return True

    busy = Busy.remote()
    assert ray.get(busy.ready.remote())
    feeds = start(source, encoder, 4, NEW, replace(CONFIG, decode_workers=0))
    first = next(data.batches(data.candidates(source, encoder, Position()), 6))
    assert samples_in(deal(feeds, 1)[0]) == samples_in([Step([first.examples], 0, (), {}, {})])
    feeds[0].close()
    ray.kill(busy)
