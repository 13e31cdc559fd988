"""The training stream without Ray: its order, its position, what it refuses, how it is cut into steps."""

from __future__ import annotations

import random
import tarfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from models import random_example
from samples import caption_encoder, content, jpeg, sample, write_shards, write_tar
from transformers import PreTrainedTokenizerBase

from artemis_vlm import RunError
from pipelines import data, storage
from pipelines.data import Candidate, Counts, Encoder, Position, Source
from pipelines.shards import RawSample, Rows, Shard, find_shards, open_rows, split_uid


@pytest.fixture(scope="module")
def encoder(tokenizer: PreTrainedTokenizerBase) -> Encoder:
    return caption_encoder(tokenizer)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """5 shards of 7 rows. Not to be written to."""
    return write_shards(tmp_path_factory.mktemp("shards"), 5, 7)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the shards opened, in turn."""
    names: list[str] = []
    original = data.open_rows

    @contextmanager
    def open_rows(shard: Shard) -> Iterator[Rows]:
        names.append(shard.name)
        with original(shard) as rows:
            yield rows

    monkeypatch.setattr(data, "open_rows", open_rows)
    return names


START = Position()


def uids(source: Source, count: int, start: Position = START) -> list[str]:
    return [raw.uid for _, raw in islice(raws(source, start), count)]


def raws(source: Source, start: Position = START) -> Iterator[tuple[Position, RawSample]]:
    for turn in source.turns(start):
        yield from turn.read()


# --- the order -------------------------------------------------------------------------------------------------------


def test_the_order_depends_on_names_seed_and_epoch_alone(folder: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in sorted(folder.iterdir(), reverse=True):
        (moved / path.name).write_bytes(path.read_bytes())
    here, there = (data.find_source(str(place), 3, 0) for place in (folder, moved))
    assert uids(here, 70) == uids(there, 70)
    first, second = uids(here, 70)[:35], uids(here, 70)[35:]
    assert first != second
    assert uids(replace(here, seed=4), 35) not in (first, second)
    assert [s.name for s in here.order(0)] != sorted(s.name for s in here.shards)


def test_every_row_once_an_epoch_shard_after_shard(folder: Path) -> None:
    source = data.find_source(str(folder), 0, 0)
    for epoch in range(3):
        seen = uids(source, 35, Position(epoch))
        assert len(set(seen)) == 35
        names = [uid.split("/")[0] for uid in seen]
        assert names == [shard.name for shard in source.order(epoch) for _ in range(7)]


def test_the_order_is_pinned() -> None:
    """Changing it would break every run under way."""
    shards = [Shard(f"{i}.tar", "") for i in range(6)]
    assert "".join(s.name[0] for s in Source(shards, 0).order(0)) == "340125"
    assert "".join(s.name[0] for s in Source(shards, 1).order(2)) == "234105"
    assert data.permutation(8, 7, 1, "a.tar").tolist() == [5, 2, 4, 3, 7, 6, 0, 1]


def test_a_resume_from_any_position_is_the_rest(folder: Path, encoder: Encoder) -> None:
    source = data.find_source(str(folder), 5, 3)
    whole = list(islice(data.candidates(source, encoder, Position()), 80))  # epochs of 32
    assert len({c.after for c in whole}) == 80
    for number, candidate in enumerate(whole[:70]):
        rest = data.candidates(source, encoder, candidate.after)
        assert [content(c) for c in islice(rest, 4)] == [content(c) for c in whole[number + 1 : number + 5]]


def test_held_out_rows_are_the_first_and_never_trained_on(folder: Path, encoder: Encoder, opened: list[str]) -> None:
    held = [e.uid for e in data.first_examples(find_shards(str(folder)), encoder, 10)]
    assert held == [f"sa_00000{n // 7}.tar/{n:05d}" for n in range(10)]
    source = data.find_source(str(folder), 0, 10)
    assert opened == ["sa_000000.tar", "sa_000001.tar"] * 2
    trained = uids(source, 50)
    assert set(trained[:25]) == set(trained[25:])
    assert len(set(trained)) == 25
    assert not set(trained) & set(held)


def test_no_shard_is_opened_before_its_turn(tmp_path: Path, encoder: Encoder, opened: list[str]) -> None:
    source = data.find_source(str(write_shards(tmp_path, 50, 12)), 0, 0)
    assert not opened
    assert len(list(islice(data.candidates(source, encoder, Position()), 20))) == 20
    assert opened == [s.name for s in source.order(0)[:2]]
    opened.clear()
    next(data.candidates(source, encoder, Position(0, 48, 11)))
    assert opened == [source.order(0)[48].name]


def test_a_stream_without_samples_ends(tmp_path: Path, encoder: Encoder) -> None:
    write_tar(tmp_path / "a.tar", [])
    write_tar(tmp_path / "b.tar", [])
    with pytest.raises(RunError, match="2 shards hold no samples"):
        next(data.candidates(data.find_source(str(tmp_path), 0, 0), encoder, Position()))


@pytest.mark.parametrize(("held_out", "fits"), [(0, True), (7, True), (34, True), (35, False), (99, False)])
def test_something_must_be_left_to_train_on(folder: Path, held_out: int, fits: bool) -> None:
    if fits:
        assert sum(data.find_source(str(folder), 0, held_out).held_out.values()) == held_out
    else:
        with pytest.raises(RunError, match=f"has 35 samples; {held_out} are to be held out"):
            data.find_source(str(folder), 0, held_out)


# --- bad samples -----------------------------------------------------------------------------------------------------

BAD = {
    "corrupt": ({"jpg": jpeg(0, 400, 300)[:2000], "txt": "a"}, "the JPEG image (400x300) is damaged"),
    "noise": ({"jpg": b"GIF89a?" * 9, "txt": "a"}, "not a readable image"),
    "empty-image": ({"jpg": b"", "txt": "a"}, "0 bytes are not a readable image"),
    "no-text": ({"jpg": jpeg()}, "not whole: found jpg"),
    "no-image": ({"txt": "a"}, "not whole: found txt"),
    "empty-text": ({"jpg": jpeg(), "txt": " \n"}, "the caption is empty"),
    "latin-1": ({"jpg": jpeg(), "txt": "caf\u00e9".encode("latin-1")}, "not UTF-8 (byte 3)"),
    "long-text": ({"jpg": jpeg(), "txt": "word " * 400}, "tokens; the limit is 256"),
    "ribbon": ({"jpg": jpeg(0, 1, 300), "txt": "a"}, "at most 200 times"),
}


def test_bad_samples_are_counted_with_their_reasons_and_do_not_move_the_others(tmp_path: Path, encoder: Encoder) -> None:
    good = [sample(n) for n in range(20)]
    bad = [(key, files) for key, (files, _) in BAD.items()]
    write_tar(tmp_path / "bad.tar", good[:10] + bad + good[10:])
    healed = [(key, sample(99)[1]) for key, _ in bad]
    write_tar(tmp_path / "healed.tar", good[:10] + healed + good[10:])
    shards = [replace(find_shards(str(tmp_path / f"{name}.tar"))[0], name="same.tar") for name in ("bad", "healed")]
    broken, whole = (list(islice(data.candidates(Source([s], 0), encoder, Position()), 29)) for s in shards)

    assert [(c.after, c.uid) for c in broken] == [(c.after, c.uid) for c in whole]
    errors = {c.uid.split("/")[1]: c.error for c in broken if c.example is None}
    assert errors.keys() == BAD.keys()
    for key, (_, reason) in BAD.items():
        assert reason in errors[key]
    assert [content(c) for c in broken if c.example] == [content(c) for c in whole if c.uid.split("/")[1] not in BAD]

    steps = list(islice(data.batches(iter(broken), 5), 4))
    assert [len(s.examples) for s in steps] == [5] * 4
    for step in steps:
        assert step.counts.seen == step.counts.used + step.counts.quarantined
        assert step.position.row == step.counts.seen
    assert [uid for s in steps for uid, _ in s.quarantined] == [c.uid for c in broken[: steps[-1].counts.seen] if c.error]


def tar_rows(path: Path, content: bytes) -> dict[str, str]:
    """Errors by key of a tar with such content, in file order."""
    path.write_bytes(content)
    with open_rows(Shard("a.tar", str(path))) as rows:
        return {rows[i].uid.removeprefix("a.tar/"): rows[i].error for i in range(len(rows))}


def headers(content: bytes) -> list[int]:
    return [i for i in range(0, len(content) - 1024, 512) if content[i + 257 : i + 262] == b"ustar"]


@pytest.mark.parametrize("cut", ["data", "header", "boundary"])
def test_a_cut_tar_keeps_its_good_part_and_is_one_bad_row(tmp_path: Path, encoder: Encoder, cut: str) -> None:
    path = write_tar(tmp_path / "a.tar", map(sample, range(10)))
    with tarfile.open(path) as archive:
        sixth = archive.getmember("00006.jpg")
    end = {"data": sixth.offset_data + 100, "header": sixth.offset + 100, "boundary": sixth.offset}[cut]
    path.write_bytes(path.read_bytes()[:end])
    found = list(islice(data.candidates(data.find_source(str(path), 0, 0), encoder, Position()), 7))
    (bad,) = [c for c in found if c.error]
    assert {c.uid for c in found} == {f"a.tar/{n:05d}" for n in range(6)} | {bad.uid}
    assert bad.uid == f"a.tar/(bytes {sixth.offset} to {end})"
    lost = end - sixth.offset
    assert bad.error == (f"{lost} bytes of the shard are damaged" if lost else "the shard is cut off: no end mark")


def test_a_flipped_header_costs_its_own_member_alone(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "whole.tar", map(sample, range(8))).read_bytes()
    rng = random.Random(0)
    places = headers(whole)
    assert len(places) == 16
    for _ in range(50):
        member = rng.randrange(16)
        damaged = bytearray(whole)
        for _ in range(rng.choice([1, 3, 40])):
            damaged[places[member] + rng.randrange(257)] = rng.randrange(256)
        found = tar_rows(tmp_path / "a.tar", damaged)
        if damaged != whole:
            end = places[member + 1] if member < 15 else len(whole)
            good = {f"{n:05d}" for n in range(8)} - {f"{member // 2:05d}"}
            assert {key for key, error in found.items() if not error} == good
            assert found[f"(bytes {places[member]} to {end})"] == f"{end - places[member]} bytes of the shard are damaged"
            assert "not whole" in found[f"{member // 2:05d}"]


def test_no_content_of_a_tar_is_passed_over_in_silence(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    whole = write_tar(path, map(sample, range(4))).read_bytes()
    more = write_tar(path, map(sample, range(4, 6))).read_bytes()
    assert list(tar_rows(path, whole + more)) == [f"{n:05d}" for n in range(6)], "one archive after another"
    assert tar_rows(path, whole + whole)["00000"] == "the shard holds 00000.txt twice"
    assert tar_rows(path, b"<html>" * 1000) == {"(bytes 0 to 6000)": "6000 bytes of the shard are damaged"}
    assert "no end mark" in tar_rows(path, b"")["(bytes 0 to 0)"]
    hole = whole[: headers(whole)[4]] + bytes(1 << 20)  # a download that was never finished
    assert f"(bytes {headers(whole)[4]} to {len(hole)})" in tar_rows(path, hole)
    two = write_tar(path, [("a", {"jpg": jpeg(), "png": jpeg(), "txt": "a"})]).read_bytes()
    assert "not whole: found jpg, png, txt" in tar_rows(path, two)["a"]


@pytest.mark.parametrize("record", [20, 256, 512, 2048])
def test_a_last_record_is_filled_up_with_zeros(tmp_path: Path, record: int) -> None:
    """`tar -b`, in blocks of 512 bytes."""
    path = tmp_path / "a.tar"
    whole = write_tar(path, map(sample, range(4))).read_bytes().rstrip(b"\0")
    whole += bytes(-len(whole) % 512 + 1024)
    filled = whole + bytes(-len(whole) % (512 * record))
    assert set(tar_rows(path, filled).values()) == {""}
    assert not any("damaged" in error for error in tar_rows(path, filled + filled).values())
    cut = tar_rows(path, filled[:-512])
    assert any("damaged" in error for error in cut.values()) == (record > 128), "many zeros, and no record's end"


@pytest.mark.parametrize("size", [-512, -1024, 2**62])
def test_a_hostile_header_is_damage(tmp_path: Path, size: int) -> None:
    """A negative size once sent `tarfile` round in circles."""
    content = bytearray(write_tar(tmp_path / "a.tar", map(sample, range(3))).read_bytes())
    at = headers(content)[2]
    content[at + 124 : at + 136] = (size if size < 0 else size | 1 << 95).to_bytes(12, "big", signed=size < 0)
    content[at + 148 : at + 156] = b" " * 8
    content[at + 148 : at + 156] = b"%06o\0 " % sum(content[at : at + 512])
    found = tar_rows(tmp_path / "a.tar", content)
    assert [key for key, error in found.items() if not error] == ["00000", "00002"]


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_kind_of_tar_gives_the_same_samples(tmp_path: Path, kind: int) -> None:
    folder = tmp_path / f"{'long' * 20}" / f"{'name' * 15}"
    write_shards(folder, 1, 2)
    with tarfile.open(folder / "sa_000000.tar") as archive:
        for member in archive:  # not extractall: its filter came with Python 3.11.4
            content = archive.extractfile(member)
            assert content is not None
            (folder / member.name).write_bytes(content.read())
    (folder / "00001.json").symlink_to("00001.txt")
    if kind != tarfile.USTAR_FORMAT:  # which has no room for so long a target
        (folder / "00000.json").symlink_to("../" * 60 + "00000.txt")
    with tarfile.open(tmp_path / "a.tar", "w", format=kind) as archive:
        archive.add(tmp_path, arcname="top", filter=lambda m: None if m.name.endswith(".tar") else m)
    with open_rows(Shard("a.tar", str(tmp_path / "a.tar"))) as rows:
        found = {rows[i].uid: rows[i] for i in range(len(rows))}
    for n in range(2):
        raw = found.pop(f"a.tar/top/{'long' * 20}/{'name' * 15}/{n:05d}")
        assert (raw.image, raw.text.decode(), raw.error) == (sample(n)[1]["jpg"], sample(n)[1]["txt"], "")
    assert not found


@pytest.mark.parametrize("shard", ["sa_000000.tar", "x/b.c.parquet", "deep/er/data-00000-of-00001.arrow"])
@pytest.mark.parametrize("key", ["0007", "./train/0007", "of a.tar/0007", "(bytes 0 to 6000)", "two\nlines"])
def test_a_uid_is_cut_after_its_shard(shard: str, key: str) -> None:
    assert split_uid(f"{shard}/{key}") == (shard, key)


def test_names_that_are_no_utf8_become_text(tmp_path: Path, encoder: Encoder) -> None:
    path = write_tar(tmp_path / "a.tar", [("caf\udce9", sample(1)[1]), ("\u5bb6", sample(2)[1])])
    found = list(islice(data.candidates(data.find_source(str(path), 0, 0), encoder, Position()), 2))
    assert {c.uid for c in found} == {"a.tar/caf\\xe9", "a.tar/\u5bb6"}
    assert not any(c.error for c in found)


def stream(pattern: str) -> Iterator[Candidate]:
    """Candidates that are good where the pattern has a `.`."""
    example = random_example(np.random.default_rng(0), "x", (2, 2), 1, 1)
    for number, letter in enumerate(pattern):
        yield Candidate(Position(0, 0, number + 1), f"u{number}", example if letter == "." else None, f"bad {letter}")


def test_a_hundred_bad_samples_in_a_row_stop_the_run() -> None:
    assert len(list(data.batches(stream("." * 50 + "x" * 99 + "." * 50), 10))) == 10
    with pytest.raises(RunError, match=r"100 samples in a row were unusable, the last u147: bad x; .* check the data"):
        list(data.batches(stream("." * 50 + "x" * 100), 10))


def test_a_share_of_bad_samples_above_the_limit_stops_the_run() -> None:
    assert len(list(data.batches(stream("." * 1980 + "x" * 20), 10))) == 198, "exactly the limit"
    reason = r"21 of 2001 samples \(1\.0%\) were unusable, more than 1\.0%, the last .*u2000: bad x; .* --max-bad-share"
    with pytest.raises(RunError, match=reason):
        list(data.batches(stream("." * 1980 + "x" * 21), 10))
    assert list(data.batches(stream("." * 500 + "x" * 90), 10)), "too few seen to judge"
    assert len(list(data.batches(stream("x." * 2000), 10, max_bad_share=0.51))) == 200
    with pytest.raises(RunError, match="11 of 1001 samples"):  # counts go on where the run left off
        list(data.batches(stream("x"), 10, Counts(1000, 990, 10)))


# --- steps -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [4, 8, 32])
def test_a_step_is_the_same_samples_for_any_number_of_ranks(batch_size: int) -> None:
    rng = np.random.default_rng(batch_size)
    budget = 300
    for _ in range(30):
        examples = [
            random_example(rng, f"u{i}", (2, 2 * int(rng.integers(1, 30))), 5, int(rng.integers(1, 100)))
            for i in range(batch_size)
        ]
        for ranks in (1, 2, 3, 4):
            shares = data.split(examples, ranks, budget)
            assert len(shares) == ranks
            assert Counter(e.uid for share in shares for part in share for e in part) == Counter(e.uid for e in examples)
            assert all(part for share in shares for part in share)
            parts = [part for share in shares for part in share]
            assert all(len(part) == 1 or sum(e.n_tokens for e in part) <= budget for part in parts)
            fewest = [-(-sum(e.n_tokens for part in share for e in part) // budget) for share in shares]
            assert all(len(share) <= 2 * least for share, least in zip(shares, fewest))
            again = data.split(examples, ranks, budget)
            assert [[[e.uid for e in p] for p in s] for s in again] == [[[e.uid for e in p] for p in s] for s in shares]


def test_a_large_budget_is_one_micro_batch_and_ranks_are_balanced() -> None:
    rng = np.random.default_rng(0)
    examples = [random_example(rng, f"u{i}", (4, 4), 5, int(rng.integers(40, 120))) for i in range(32)]
    shares = data.split(examples, 4, 10**9)
    assert [len(share) for share in shares] == [1] * 4
    tokens = [sum(e.n_tokens for e in share[0]) for share in shares]
    assert max(tokens) - min(tokens) < 0.1 * max(tokens)


# --- where the samples are -------------------------------------------------------------------------------------------


def rows_of(uri: Path | str) -> list[tuple[str, bytes, bytes, str]]:
    found = []
    for shard in find_shards(str(uri)):
        with open_rows(shard) as rows:
            found += [(r.uid, r.image, r.text, r.error) for r in (rows[i] for i in range(len(rows)))]
    return found


IMAGES = [jpeg(n) for n in range(4)]
TEXTS = ["one", "zwei", "\u4e09", "four"]


@pytest.mark.parametrize("text_column", ["text", "caption"])
@pytest.mark.parametrize("struct", [True, False], ids=["hf-struct", "bytes"])
def test_parquet(tmp_path: Path, text_column: str, struct: bool) -> None:
    folder = tmp_path / "split=train"  # a name that Arrow would take for a column
    folder.mkdir()
    images = [{"bytes": b, "path": None} for b in IMAGES] if struct else IMAGES
    table = pa.table({"id": range(4), text_column: TEXTS, "image": images})
    pq.write_table(table, folder / "a.parquet", row_group_size=3)
    assert rows_of(folder) == [(f"a.parquet/{i}", IMAGES[i], TEXTS[i].encode(), "") for i in range(4)]


def test_rows_of_a_table_that_are_not_whole(tmp_path: Path) -> None:
    images = [{"bytes": None, "path": "a.jpg"}, None, {"bytes": IMAGES[0], "path": None}]
    pq.write_table(pa.table({"text": ["a", "b", None], "image": images}), tmp_path / "a.parquet")
    assert [error for *_, error in rows_of(tmp_path)] == ["the row has no image bytes or no text"] * 3


def test_a_saved_dataset(tmp_path: Path) -> None:
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    rows = {"image": [{"bytes": b, "path": None} for b in IMAGES], "text": TEXTS}
    dataset = datasets.Dataset.from_dict(rows, features)
    datasets.DatasetDict({"train": dataset, "test": dataset}).save_to_disk(
        tmp_path / "both", num_shards={"train": 2, "test": 1}
    )
    dataset.save_to_disk(tmp_path / "one")
    (tmp_path / "one" / "cache-0123.arrow").write_bytes(b"left by map")
    for place, shards in (("one", 1), ("both", 2)):
        found = rows_of(tmp_path / place)
        assert [row[1:] for row in found] == [(b, t.encode(), "") for b, t in zip(IMAGES, TEXTS)]
        assert len({uid.split("/")[0] for uid, *_ in found}) == shards


def test_a_saved_dataset_elsewhere_gives_its_training_split() -> None:
    store = fsspec.filesystem("memory")
    for name in ("dataset_dict.json", "test/data-00000-of-00001.arrow", "train/data-00000-of-00001.arrow"):
        store.pipe(f"/saved/{name}", b"x")
    (shard,) = find_shards("memory://saved")
    assert shard.uri == "memory:///saved/train/data-00000-of-00001.arrow"


def test_a_file_that_fails_to_open_is_tried_again_then_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = find_shards(str(folder))[0]
    pauses: list[float] = []
    failures = [OSError(5, "Input/output error")] * 5
    opening = Path.open

    def flaky(self: Path, mode: str) -> Any:
        if failures:
            raise failures.pop()
        return opening(self, mode)

    monkeypatch.setattr(Path, "open", flaky)
    monkeypatch.setattr(storage.time, "sleep", pauses.append)
    with pytest.raises(RunError, match=r"sa_000000\.tar could not be read in 4 attempts: .* Input/output error"):
        open_rows(shard).__enter__()
    with open_rows(shard) as rows:
        assert len(rows) == 7
    assert pauses == [1.0, 2.0, 4.0, 1.0]


def test_places(folder: Path, tmp_path: Path) -> None:
    names = [f"sa_{n:06d}.tar" for n in range(5)]
    assert [s.name for s in find_shards(str(folder))] == names
    assert [s.name for s in find_shards(f"file://{folder}")] == names
    assert [s.name for s in find_shards(f"{folder}/sa_*3.tar")] == names[3:4]
    assert [s.name for s in find_shards(f"{folder}/{names[2]}")] == names[2:3]
    assert [s.name for s in find_shards(f"{folder}/../{folder.name[:-1]}?/sa_00000[13].tar")] == [names[1], names[3]]
    write_shards(tmp_path / "deep" / "x", 1, 1)
    write_shards(tmp_path / "deep" / "xy", 1, 1)
    both = ["x/sa_000000.tar", "xy/sa_000000.tar"]
    assert [s.name for s in find_shards(str(tmp_path / "deep"))] == both
    assert [s.name for s in find_shards(str(tmp_path / "dee*"))] == both
    assert [s.name for s in find_shards(str(tmp_path / "deep" / "x*"))] == both


def test_folders_behind_links_are_read_once(tmp_path: Path) -> None:
    for place in ("data/a", "data/m", "elsewhere/below"):
        write_shards(tmp_path / place, 1, 1)
    (tmp_path / "data" / "b").symlink_to("../elsewhere")
    (tmp_path / "data" / "before").symlink_to("m")  # read already, by its own name
    (tmp_path / "elsewhere" / "up").symlink_to("../data")
    (tmp_path / "data" / "gone").symlink_to("nowhere")
    (tmp_path / "linked").symlink_to("data")
    expected = [f"{place}/sa_000000.tar" for place in ("a", "b/below", "m")]
    for place in ("data", "linked", "[dl]*"):
        assert [s.name for s in find_shards(str(tmp_path / place))] == expected


def test_data_that_cannot_be_used_is_told_in_a_sentence(tmp_path: Path, encoder: Encoder) -> None:
    with pytest.raises(RunError, match=r"holds nothing; expected \.tar"):
        find_shards(str(tmp_path))
    with pytest.raises(RunError, match=r"missing does not exist; expected \.tar"):
        find_shards(str(tmp_path / "missing"))
    with pytest.raises(RunError, match=r"missing\* holds nothing; expected \.tar"):
        find_shards(str(tmp_path / "missing*"))
    (tmp_path / "notes.md").write_text("-")
    with pytest.raises(RunError, match="holds 1 files, none of them a shard"):
        find_shards(str(tmp_path))
    with pytest.raises(
        RunError, match="no-such-org/no-such-data cannot be listed: no such folder is here, and on"
    ):  # the hub is off in tests
        find_shards("no-such-org/no-such-data")
    with pytest.raises(RunError, match="nfs9://host/x cannot be listed: Protocol not known"):
        find_shards("nfs9://host/x")
    pq.write_table(pa.table({"text": ["a"], "img": [b"b"]}), tmp_path / "a.parquet")
    with pytest.raises(RunError, match=r"has the columns \['text', 'img'\]; expected image"):
        rows_of(tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(RunError, match=r"b\.parquet is damaged"):
        rows_of(tmp_path / "b.parquet")
    (shard,) = find_shards(str(tmp_path / "a.parquet"))
    (tmp_path / "a.parquet").unlink()
    with pytest.raises(RunError, match=r"a\.parquet is gone"), open_rows(shard):
        pass
    write_tar(tmp_path / "c.tar", [("a", {"jpg": b"", "txt": "b"})])
    with pytest.raises(RunError, match="no usable sample to evaluate on"):
        data.first_examples(find_shards(str(tmp_path / "c.tar")), encoder, 5)
