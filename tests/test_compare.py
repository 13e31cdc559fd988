"""Comparison of models: known answers for every figure, on tiny models and real encoding; bad input is one sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sacrebleu
import torch
from models import SPEC
from safetensors.torch import load_file, save_file
from samples import jpeg, write_shards, write_tar

from artemis_vlm import RunError, graft
from artemis_vlm.frozen import use_packed_attention
from artemis_vlm.modeling import packed_loss
from artemis_vlm.packing import pack
from demo.compare import name_lines
from demo.scenes import DEMO_NAMES, object_name_spans, scene
from jobs.compare import main
from pipelines.bootstrap import draws, ratio, resample
from pipelines.compare import (
    CompareConfig,
    compare,
    exchanged,
    find_entrants,
    find_sets,
    name_tokens,
    short_names,
    token_losses,
)
from pipelines.compare_page import page, verdict, write_comparison
from pipelines.data import Position
from pipelines.figures import FIGURES, Row, compare_figure, shown
from pipelines.names import Names
from pipelines.unchanged import compare_ids

NAMES = Names([("cat", "cats"), ("apple", "apples"), ("green apple", "green apples"), ("mouse", "mice")])


# --- counts and sums -------------------------------------------------------------------------------------------------


def test_the_bootstrap_is_the_direct_computation() -> None:
    rng = np.random.default_rng(0)
    losses, tokens = rng.normal(30, 6, 50), rng.integers(5, 20, 50)
    drawn = draws(50, seed=3, resamples=400)
    assert (drawn.sum(1) == 50).all()
    found = resample(np.stack([losses, tokens], 1), ratio, drawn)
    direct = []
    for counts in drawn:
        chosen = np.repeat(np.arange(50), counts)
        direct.append(losses[chosen].sum() / tokens[chosen].sum())
    assert found.value == losses.sum() / tokens.sum()
    np.testing.assert_allclose(found.values, direct, rtol=1e-12)
    low, high = np.percentile(direct, (2.5, 97.5))
    np.testing.assert_allclose((found.interval().low, found.interval().high), (low, high), rtol=1e-12)
    assert (draws(50, seed=3, resamples=400) == drawn).all()
    assert (draws(50, seed=4, resamples=400) != drawn).any()


def test_intervals_are_as_wide_as_theory_says() -> None:
    """Of a mean of 400 normal values: 1.96 standard errors to each side."""
    values = np.random.default_rng(1).normal(5, 2, 400)
    interval = resample(np.stack([values, np.ones(400)], 1), ratio, draws(400, seed=0)).interval()
    expected = 1.96 * values.std() / 20
    assert (interval.high - interval.low) / 2 == pytest.approx(expected, rel=0.07)
    assert interval.clear


def test_a_share_of_nothing_is_not_a_number() -> None:
    interval = resample(np.zeros((4, 2)), ratio, draws(4, seed=0)).interval()
    assert all(np.isnan(v) for v in (interval.value, interval.low, interval.high))
    assert not interval.clear
    assert shown(figure("recall"), interval) == "n/a"


def test_names_are_whole_words_longest_first_in_any_case(tmp_path: Path) -> None:
    assert NAMES.in_text("Two green apples, a pineapple and Mice.") == {"green apple", "mouse"}
    assert NAMES.in_text("An apple is not a cat-flap") == {"apple"}
    assert [("x Cats y"[a:b]) for a, b in NAMES.spans("x Cats y")] == ["Cats"]
    file = tmp_path / "names.txt"
    file.write_text("cat, cats\n\nmouse,mice\n")
    assert Names.load(file).forms == [("cat", "cats"), ("mouse", "mice")]


def test_the_demos_names_are_found_here_as_there(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text(name_lines(DEMO_NAMES))
    names = Names.load(tmp_path / "names.txt")
    for index in range(40):
        text = scene(0, index, split="ood").caption.lower()
        assert names.spans(text) == object_name_spans(text, DEMO_NAMES)


def figure(key: str) -> Any:
    return next(f for f in FIGURES if f.key == key)


def row(caption: str, truth: str, loss: float = 0.0) -> Row:
    there, told = frozenset(NAMES.in_text(truth)), frozenset(NAMES.in_text(caption))
    return Row(caption, 4, loss, loss + 2, 2, loss / 2, loss / 2 + 1, there, told)


def test_recall_and_precision_of_constructed_texts() -> None:
    truths = ["a cat and a mouse", "an apple", "a cat", "nothing"]
    captions = ["two cats", "a mouse and a green apple", "Cat!", "a mouse"]
    rows = [row(c, t) for c, t in zip(captions, truths)]
    drawn = draws(4, seed=0)
    recall, precision = (compare_figure(figure(k), [rows], truths, drawn).values[0].value for k in ("recall", "precision"))
    assert (recall, precision) == (2 / 4, 2 / 5)
    silent = [replace(r, told=frozenset()) for r in rows]
    (difference,) = compare_figure(figure("precision"), [silent, rows], truths, drawn).differences
    assert np.isnan([difference.interval.value, difference.better]).all()
    rows[0] = silent[0]
    assert compare_figure(figure("recall"), [rows], truths, drawn).values[0].value == 1 / 4


def test_losses_are_per_token_and_differences_are_paired() -> None:
    truths = ["a cat"] * 30
    rng = np.random.default_rng(0)
    first = [row("a cat", "a cat", loss) for loss in rng.normal(40, 20, 30)]
    second = [replace(r, loss=r.loss - 1, shuffled=r.shuffled - 1) for r in first]
    drawn = draws(30, seed=0)
    loss = compare_figure(figure("loss"), [first, second], truths, drawn)
    assert loss.values[0].value == pytest.approx(sum(r.loss for r in first) / 120)
    (difference,) = loss.differences
    for value in (difference.interval.value, difference.interval.low, difference.interval.high):
        assert value == pytest.approx(-0.25), "each sample differs by as much, so there is no doubt"
    assert difference.better == 1.0
    assert loss.values[0].high - loss.values[0].low > 1
    assert compare_figure(figure("gain"), [first], truths, drawn).values[0].value == pytest.approx(0.5)
    three = compare_figure(figure("loss"), [first, second, first], truths, drawn)
    assert [(d.earlier, d.later) for d in three.differences] == [(0, 1), (0, 2), (1, 2)]


def test_text_scores_are_sacrebleus() -> None:
    truths = ["a small cat sits on the left of the picture", "two red apples on a plain background", "a mouse"]
    captions = ["a cat sits at the left of the picture", "two apples on a plain white background", ""]
    rows = [row(c, t) for c, t in zip(captions, truths)]
    drawn = draws(3, seed=0)
    for key, public in (("bleu", sacrebleu.corpus_bleu), ("chrf", sacrebleu.corpus_chrf)):
        value = compare_figure(figure(key), [rows], truths, drawn).values[0].value
        assert value == pytest.approx(public(captions, [truths]).score), key
        assert value > 10


def test_paths_are_named_by_their_last_parts() -> None:
    assert short_names(["runs/a/a3", "runs/b/a3"]) == ["a/a3", "b/a3"]
    assert short_names(["s3://x/heldout/", "/data/ood"]) == ["heldout", "ood"]
    assert short_names(["m/a3", "m/a3", "b"]) == ["a3 (1)", "a3 (2)", "b"]


@pytest.fixture(autouse=True, scope="module")
def tokenizers_read_once() -> Iterator[None]:
    """Each takes two seconds; equal files give the same one here."""
    loaded: dict[bytes, Any] = {}
    load = graft.load_tokenizer

    def cached(folder: Path) -> Any:
        key = b"".join((folder / name).read_bytes() for name in ("tokenizer.json", "chat_template.jinja"))
        if key not in loaded:
            loaded[key] = load(folder)
        return loaded[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graft, "load_tokenizer", cached)
        yield


# --- models ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of several sizes."""
    return write_shards(tmp_path_factory.mktemp("data") / "pictures", shards=2, rows=4)


@pytest.fixture(scope="module")
def alike(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One size, other pixels."""
    folder = tmp_path_factory.mktemp("alike")
    write_tar(folder / "a.tar", [(str(i), {"jpg": jpeg(i), "txt": f"a cat, number {i}"}) for i in range(4)])
    return folder


@pytest.fixture(scope="module")
def small(sources: graft.Sources, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small form of another projector between the same parts."""
    folder = tmp_path_factory.mktemp("small")
    named = graft.Sources(sources.tower, sources.decoder, str(sources.tower), str(sources.decoder))
    state = {k: v + 0.3 for k, v in graft.new_projector(sources, seed=1).items()}
    graft.write_projector(folder, named, state, SPEC)
    return folder


def configured(models: Sequence[Path], data: Sequence[Path], output: Path, **fields: Any) -> CompareConfig:
    return CompareConfig(
        **{
            "model": tuple(map(str, models)),
            "data": tuple(map(str, data)),
            "output": str(output),
            "max_new_tokens": 4,
            "dtype": "float32",
            "device": "cpu",
        }
        | fields
    )


def quiet(_: str) -> None:
    pass


def test_the_same_model_twice_does_not_differ_at_all(a3: Path, data: Path, tmp_path: Path) -> None:
    comparison = compare(configured([a3, a3], [data], tmp_path / "out"), quiet)
    for compared in comparison.sets[0].figures:
        (difference,) = compared.differences
        assert (difference.interval.value, difference.interval.low, difference.interval.high) == (0, 0, 0)
        assert difference.better == 0
    assert "cannot be told apart: +0.000 [+0.000, +0.000]" in verdict(comparison.sets[0], ["a", "b"])


def test_two_forms_two_sets_and_the_same_bytes_again(a3: Path, small: Path, data: Path, alike: Path, tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("picture, pictures\ncat, cats\n")
    written = []
    for run in ("one", "two"):
        config = configured([a3, small], [data, alike], tmp_path / run, names=str(names), count=5)
        comparison = compare(config, quiet)
        write_comparison(comparison)
        written.append([(tmp_path / run / name).read_bytes() for name in ("comparison.html", "comparison.json")])
    assert written[0] == written[1]
    found = json.loads(written[0][1])
    assert list(found["sets"]) == [data.name, alike.name]
    assert [len(s["samples"]) for s in found["sets"].values()] == [5, 4]
    losses = found["sets"][data.name]["figures"]["loss"]
    for model, of_model in enumerate(losses["models"]):
        rows = [s["models"][model] for s in found["sets"][data.name]["samples"]]
        assert of_model["value"] == pytest.approx(sum(r["loss"] for r in rows) / sum(r["tokens"] for r in rows))
        assert of_model["low"] < of_model["value"] < of_model["high"]
    (difference,) = losses["differences"]
    assert difference["value"] == pytest.approx(losses["models"][1]["value"] - losses["models"][0]["value"])
    assert difference["value"] != 0
    sample = found["sets"][alike.name]["samples"][0]
    assert (sample["uid"], sample["truth"], sample["models"][0]["there"]) == ("a.tar/0", "a cat, number 0", ["cat"])


def test_a_blind_model_gains_nothing_and_a_seeing_one_something(a3: Path, alike: Path, tmp_path: Path) -> None:
    blind = shutil.copytree(a3, tmp_path / "blind")
    for file in blind.glob("model-*.safetensors"):
        tensors = load_file(file)
        for key in tensors:
            if key.startswith("multi_modal_projector."):
                tensors[key] = torch.zeros_like(tensors[key])
        save_file(tensors, file, metadata={"format": "pt"})
    comparison = compare(configured([blind, a3], [alike], tmp_path / "out"), quiet)
    gains = next(c for c in comparison.sets[0].figures if c.figure.key == "gain").values
    assert (gains[0].value, gains[0].low, gains[0].high) == (0, 0, 0)
    assert gains[1].value != 0
    assert "blind shows no sign of looking" in verdict(comparison.sets[0], ["blind", "seeing"])


def test_losses_are_those_of_training_and_images_change_hands(a3: Path, data: Path) -> None:
    (entrant,) = find_entrants([str(a3)], "Describe this image in detail.")
    (found,) = find_sets([str(data)], 8, entrant.encoder)
    model = entrant.load(torch.float32, "cpu")
    examples = [c.example for c in entrant.encoder.candidates([(Position(), raw) for raw in found.samples]) if c.example]
    ours = sum(token_losses(model, e, SPEC).sum() for e in examples)
    use_packed_attention(model.visual, model.language_model)
    batch = pack(examples, image_token_id=model.config.image_token_id, merge_size=SPEC.merge_size)
    with torch.no_grad():
        assert ours == pytest.approx(packed_loss(model, batch, SPEC).item(), rel=1e-5)
    others = exchanged(examples, seed=0)
    assert [e.uid for e in others] == [e.uid for e in examples]
    assert sorted(e.patches.tobytes() for e in others) == sorted(e.patches.tobytes() for e in examples)
    for own, other in zip(examples, others):
        assert own.patches.tobytes() != other.patches.tobytes()
        assert list(own.input_ids[own.n_prompt :]) == list(other.input_ids[other.n_prompt :])


def test_the_tokens_of_names(tokenizer: Any) -> None:
    text = "Two green apples <|image_pad|> and a mouse"
    flags = name_tokens(tokenizer, text, NAMES, 60)
    (entrant_ids,) = [tokenizer.backend_tokenizer.encode("Two green apples", add_special_tokens=False).ids]
    assert flags[: len(entrant_ids)].tolist() == [False, *[True] * (len(entrant_ids) - 1)]
    assert flags.sum() > len(entrant_ids) - 1
    assert not name_tokens(tokenizer, text, None, 60).any()


def test_a_checkpoint_of_a_run_is_compared_as_it_lies(
    small: Path, sources: graft.Sources, alike: Path, tmp_path: Path
) -> None:
    """Its run.json names the frozen parts, its state their weights."""
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000008"
    checkpoint.mkdir(parents=True)
    shutil.copy(small / graft.PROJECTOR_FILE, checkpoint)
    SPEC.save(checkpoint)
    origins = {"vision_tower": str(sources.tower), "decoder": str(sources.decoder)}
    (tmp_path / "run" / "run.json").write_text(json.dumps({"sources": origins}))
    weights = graft.frozen_digest(graft.manifest_of(sources))
    (checkpoint / "state.json").write_text(json.dumps({"run": {"frozen_weights": weights}}))
    comparison = compare(configured([small, checkpoint], [alike], tmp_path / "out"), quiet)
    assert all(c.differences[0].interval.value == 0 for c in comparison.sets[0].figures)
    (checkpoint / "state.json").write_text(json.dumps({"run": {"frozen_weights": "other"}}))
    with pytest.raises(ValueError, match="was trained between other weights"):
        find_entrants([str(checkpoint)], "x")


class Tags(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_the_page_asks_nothing_of_others_and_shows_text_as_text(a3: Path, tmp_path: Path) -> None:
    folder = tmp_path / "<b>set"
    folder.mkdir()
    hostile = "a cat </p><script>alert(1)</script> {{title}} & <img src=http://x>"
    write_tar(folder / "a.tar", [(str(i), {"jpg": jpeg(i), "txt": f"{hostile} {i}"}) for i in range(3)])
    names = tmp_path / "names.txt"
    names.write_text("cat, cats\n")
    made = page(compare(configured([a3, a3], [folder], tmp_path / "out", names=str(names)), quiet))
    tags = Tags(made).found
    assert [t for t, _ in tags].count("script") == 1
    assert [t for t, _ in tags].count("article") == 3
    sources = [v for _, attributes in tags for k, v in attributes.items() if k in ("src", "href")]
    assert len(sources) == 3
    assert all(str(v).startswith("data:image/jpeg;base64,") for v in sources)
    assert any(t == "meta" and "default-src 'none'" in str(a.get("content")) for t, a in tags)
    assert 'mark class="hit">cat<' in made
    assert "&lt;script&gt;alert(1)" in made
    assert "{{title}} &amp;" in made


def test_bad_input_is_one_sentence_before_any_work(
    a3: Path, small: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*arguments: object, output: Path | None = tmp_path / "out") -> str:
        where = ["--output", str(output)] if output else []
        assert main([*map(str, arguments), *where]) == 1
        out, err = capsys.readouterr()
        assert (out, err.count("\n"), err.startswith("error: ")) == ("", 1, True), err
        return err

    assert "does not exist" in said("--model", tmp_path / "none", "--data", data)
    assert "has no config.json or projector.safetensors" in said("--model", data, "--data", data)
    assert "nothing does not exist" in said("--model", a3, "--data", tmp_path / "nothing")
    assert "count is 1" in said("--model", a3, "--data", data, "--count", 1)
    assert "device is gpu; expected cpu or cuda" in said("--model", a3, "--data", data, "--device", "gpu")
    bad = tmp_path / "bad"
    bad.mkdir()
    write_tar(bad / "a.tar", [("1", {"jpg": jpeg(), "txt": "a"}), ("2", {"jpg": b"no", "txt": "b"})])
    assert "has 1 usable samples of 2, the first because" in said("--model", a3, "--data", bad)
    assert "cannot be read" in said("--model", a3, "--data", data, "--names", tmp_path / "none.txt")
    (tmp_path / "twice.txt").write_text("cat\ndog, cat\n")
    assert "one word to two objects" in said("--model", a3, "--data", data, "--names", tmp_path / "twice.txt")
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(small / graft.PROJECTOR_FILE, alone)
    assert "has no manifest.json that names its tower and decoder" in said("--model", alone, "--data", data)
    shutil.copy(small / graft.MANIFEST_FILE, alone)
    manifest = json.loads((alone / graft.MANIFEST_FILE).read_text())
    manifest["sources"]["decoder"] = str(tmp_path / "gone")
    (alone / graft.MANIFEST_FILE).write_text(json.dumps(manifest))
    assert "gone does not exist" in said("--model", alone, "--data", data)
    (tmp_path / "file").write_text("")
    assert "cannot be written: Not a directory" in said("--model", a3, "--data", data, output=tmp_path / "file" / "x")
    assert "holds a qwen3_vl model" in said("--model", json.loads(_config(small))["vision_tower"], "--data", data)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    assert "config.json is not JSON" in said("--model", tmp_path / "broken", "--data", data)
    other = shutil.copytree(a3, tmp_path / "other")
    text = (a3 / "tokenizer.json").read_text().replace("<|video_pad|>", "<|other_pad|>")
    (other / "tokenizer.json").write_text(text)
    assert "different vocabularies" in said("--model", a3, "--model", other, "--data", data)
    with pytest.raises(RunError, match="no data"):
        configured([a3], [], tmp_path)


def _config(small: Path) -> str:
    return json.dumps(json.loads((small / graft.MANIFEST_FILE).read_text())["sources"])


def test_the_command(a3: Path, alike: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", a3, "--data", alike, "--output", tmp_path / "out", "--max-new-tokens", 2, "--count", 3]
    assert main([*map(str, arguments), "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert f"{alike.name}: 3 samples" in printed
    assert printed.endswith(f"{tmp_path / 'out'}/comparison.html\n")
    assert (tmp_path / "out" / "comparison.html").stat().st_size > 5000


# --- text ------------------------------------------------------------------------------------------------------------


def test_text_is_the_decoders_own_until_a_weight_flips(
    sources: graft.Sources, a3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(folder: Path) -> tuple[int, str]:
        arguments = ["--text", "--model", folder, "--decoder", sources.decoder, "--max-new-tokens", 3, "--device", "cpu"]
        code = main(list(map(str, arguments)))
        out, err = capsys.readouterr()
        return code, out + err

    code, said = run(a3)
    assert code == 0
    assert "answers 8 prompts without images as" in said
    assert "logits differ by at most 0\n" in said

    flipped = shutil.copytree(a3, tmp_path / "flipped")
    name = "language_model.model.layers.1.mlp.down_proj.weight"
    file = graft.stored_tensors(flipped)[name].file
    tensors = load_file(file)
    for bit, sentence in ((13, "but its logits differ by up to"), (14, "the answer differs at token")):
        tensors[name].view(torch.int16)[3, 5] ^= 1 << bit
        save_file(tensors, file, metadata={"format": "pt"})
        code, said = run(flipped)
        assert (code, sentence in said) == (1, True), said
    assert "error: a question, thinking as the template says: the answer differs at token" in said
    assert "the decoder alone has" in said

    (flipped / graft.MANIFEST_FILE).unlink()
    assert main(["--text", "--model", str(flipped)]) == 1
    assert "give --decoder" in capsys.readouterr().err


def test_where_answers_part_is_told(tokenizer: Any) -> None:
    ids = tokenizer.encode("The sky is blue", add_special_tokens=False)
    compare_ids(tokenizer, "x: the answer", ids, list(ids))
    with pytest.raises(RunError, match="x: the answer differs at token 1: the decoder alone has ' sky', the A3 'The'"):
        compare_ids(tokenizer, "x: the answer", ids, [ids[0], ids[0], *ids[2:]])
    with pytest.raises(RunError, match="at token 3: the decoder alone has ' blue', the A3 nothing more"):
        compare_ids(tokenizer, "x: the answer", ids, ids[:-1])
