"""Grafts keep frozen tensors byte for byte, and damage is named."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import SPEC, model_inputs, random_example
from numpy.random import default_rng
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from artemis_vlm import ArtemisVLMForConditionalGeneration, CheckpointError, ImageSpec, RunError, graft
from artemis_vlm.image import CLIP_MEAN, CLIP_STD, PREPROCESSOR_FILE
from jobs.graft import main


def test_every_frozen_tensor_is_byte_identical(sources: graft.Sources, a3: Path) -> None:
    written = graft.stored_tensors(a3)
    files = {t.file for t in written.values()}
    assert len(files) > 1, "several shards were written"
    copies = {k: v for file in files for k, v in load_file(file).items()}
    originals = {k: v for file in {t.file for t in sources.tensors().values()} for k, v in load_file(file).items()}
    for name in sources.tensors():
        original = originals[name.removeprefix("language_model.") if "language" in name else f"model.{name}"]
        assert original.dtype == copies[name].dtype
        assert torch.equal(original.view(torch.uint8), copies[name].view(torch.uint8))
    assert any("deepstack" in name for name in sources.tensors())
    assert graft.verify(a3, sources) == []


def test_the_folder_loads_and_means_what_was_trained(sources: graft.Sources, a3: Path) -> None:
    loaded = ArtemisVLMForConditionalGeneration.from_pretrained(a3, dtype="auto").eval()
    assert loaded.dtype == torch.bfloat16
    assert not loaded.config.image_turn_thinking
    state = graft.read_projector(a3)
    model = graft.load_frozen(sources, torch.bfloat16, projector=state)
    assert all(p.dtype == torch.float32 for p in model.multi_modal_projector.parameters())
    inputs = model_inputs(model, random_example(default_rng(0), "a", (4, 6), 5, 7))
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    graft.check_frozen(model, sources, graft.manifest_of(sources))
    graft.check_frozen(model.float(), sources, graft.manifest_of(sources))


@pytest.mark.parametrize(("dtype", "change"), [(torch.bfloat16, 1.0), (torch.float32, 1e-6)])
def test_a_changed_weight_in_memory_is_named(sources: graft.Sources, dtype: torch.dtype, change: float) -> None:
    """In float32 also a change too small to be seen in the stored bfloat16."""
    model = graft.load_frozen(sources, dtype)
    model.language_model.model.layers[1].mlp.up_proj.weight.data[3, 3] += change
    with pytest.raises(CheckpointError, match=r"1 frozen tensors .*layers\.1\.mlp\.up_proj\.weight differs"):
        graft.check_frozen(model, sources, graft.manifest_of(sources))


@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
def test_a_decoder_stored_in_another_dtype_is_checked_in_the_one_it_computes_in(
    sources: graft.Sources, tmp_path: Path, stored: torch.dtype
) -> None:
    finer = replace(sources, decoder=shutil.copytree(sources.decoder, tmp_path / "decoder"))
    for file in finer.decoder.glob("*.safetensors"):
        save_file({k: (v.float() * 1.003).to(stored) for k, v in load_file(file).items()}, file, {"format": "pt"})
    manifest = graft.manifest_of(finer)
    for dtype in (torch.bfloat16, torch.float32):
        model = graft.load_frozen(finer, dtype)
        graft.check_frozen(model, finer, manifest)
        model.language_model.model.layers[1].mlp.up_proj.weight.data[3, 3] += 1
        with pytest.raises(CheckpointError, match=r"1 frozen tensors .*layers\.1\.mlp\.up_proj\.weight differs"):
            graft.check_frozen(model, finer, manifest)


def test_what_is_not_the_models_stays_in_its_folder(sources: graft.Sources, tmp_path: Path) -> None:
    state = graft.new_projector(sources)
    for name in ("model_backup.safetensors", "model-00001-of-00009.safetensors"):
        (tmp_path / name).write_bytes(b"someone's")
    graft.write_model(tmp_path, sources, state, SPEC)
    assert (tmp_path / "model_backup.safetensors").exists()
    assert not (tmp_path / "model-00001-of-00009.safetensors").exists(), "of an earlier model in more shards"


def test_a_flipped_bit_on_disk_is_named(a3: Path, tmp_path: Path) -> None:
    damaged = shutil.copytree(a3, tmp_path / "damaged")
    file = sorted(damaged.glob("model-*"))[-1]  # the projector is in the first
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)
    (problem,) = graft.verify(damaged)
    assert "differs from the manifest" in problem


def test_the_small_form_round_trips(sources: graft.Sources, tmp_path: Path) -> None:
    model = graft.load_frozen(sources, torch.bfloat16)
    state = model.multi_modal_projector.state_dict()
    graft.write_projector(tmp_path, sources, state, SPEC)
    assert all(torch.equal(v, state[k]) for k, v in graft.read_projector(tmp_path).items())
    assert json.loads((tmp_path / "manifest.json").read_text())["sources"] == sources.origins()


def test_a_graft_takes_the_towers_own_normalisation(sources: graft.Sources) -> None:
    spec = graft.source_spec(sources, 32 * 32, 512 * 512)
    assert spec.image_mean == (0.5, 0.5, 0.5)
    assert (spec.min_pixels, spec.max_pixels) == (1024, 262144)


def test_damage_and_misfits_are_sentences(sources: graft.Sources, tmp_path: Path) -> None:
    def broken(name: str, change: dict[str, bytes | None]) -> graft.Sources:
        folder = tmp_path / name
        folder.mkdir()
        for file in sources.decoder.iterdir():
            if change.get(file.name, b"") is not None:
                (folder / file.name).write_bytes(change.get(file.name) or file.read_bytes())
        return graft.Sources(sources.tower, folder)

    shard = sorted(sources.decoder.glob("model-*"))[0]
    with pytest.raises(CheckpointError, match=f"lacks {shard.name}"):
        broken("missing", {shard.name: None}).tensors()
    with pytest.raises(CheckpointError, match=f"{shard.name} is damaged"):
        broken("truncated", {shard.name: shard.read_bytes()[:-1000]}).tensors()
    with pytest.raises(CheckpointError, match=r"config\.json is not JSON"):
        graft.tower_config(broken("unreadable", {"config.json": b"{"}).decoder)
    text = (sources.decoder / "tokenizer.json").read_text().replace("<|image_pad|>", "<|other_pad|>").encode()
    with pytest.raises(RunError, match=r"no <\|image_pad\|> token"):
        graft.graft_config(broken("blind", {"tokenizer.json": text}))
    tower = tmp_path / "tower"
    tower.mkdir()
    for file in sources.tower.iterdir():
        (tower / file.name).write_bytes(file.read_bytes())
    ImageSpec(patch_size=14).save(tower)
    with pytest.raises(CheckpointError, match="says patch_size 14, the vision tower 16"):
        graft.source_spec(graft.Sources(tower, sources.decoder))
    with pytest.raises(CheckpointError, match="no Qwen3-VL vision tower"):
        graft.Sources(sources.decoder, sources.decoder).tensors()
    with pytest.raises(CheckpointError, match="projector does not fit"):
        graft.load_frozen(sources, torch.float32, projector={"fc1.weight": torch.zeros(2, 2)})


def test_parts_that_do_not_fit_are_refused_before_anything_is_written(sources: graft.Sources, tmp_path: Path) -> None:
    def decoder_without(name: str, start: str) -> graft.Sources:
        """Its tensors under names that begin otherwise, one of them left out."""
        folder = shutil.copytree(sources.decoder, tmp_path / f"without {name}", ignore=shutil.ignore_patterns("model*"))
        tensors = {}
        for key, stored in graft.stored_tensors(sources.decoder).items():
            with safe_open(stored.file, "pt") as opened:
                tensors[key.removeprefix(start)] = opened.get_tensor(key)
        tensors.pop(name, None)
        save_file(tensors, folder / graft.WEIGHTS_FILE)
        return graft.Sources(sources.tower, folder)

    lost = "model.layers.1.mlp.up_proj.weight"
    projector = graft.new_projector(sources)
    misfits = {
        rf"language_model\.{lost} is missing$": (decoder_without(lost, ""), projector),
        r"language_model\.model\.embed_tokens\.weight is missing \(": (decoder_without("", "model."), projector),
        r"multi_modal_projector\.fc2\.bias is missing$": (
            sources,
            {name: tensor for name, tensor in projector.items() if name != "fc2.bias"},
        ),
        r"fc1\.weight has the shape \[64, 48\] instead of \[32, 48\]$": (
            sources,
            projector | {"fc1.weight": torch.zeros(64, projector["fc1.weight"].shape[1])},
        ),
    }
    for said, (parts, weights) in misfits.items():
        with pytest.raises(CheckpointError, match=said):
            graft.write_model(tmp_path / "a3", parts, weights, SPEC)
        assert not (tmp_path / "a3").exists()
    with pytest.raises(CheckpointError, match=rf"lacks 1 tensors, {lost} among them"):
        graft.load_frozen(next(iter(misfits.values()))[0], torch.float32)
    with pytest.raises(CheckpointError, match="holds a qwen3_vl model; expected a causal decoder"):
        graft.graft_config(graft.Sources(sources.tower, sources.tower))
    with pytest.raises(RunError, match="max_pixels is 100"):
        graft.source_spec(sources, max_pixels=100)


def test_the_command_builds_and_verifies(sources: graft.Sources, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*arguments: object) -> tuple[int, str]:
        code = main([str(a) for a in arguments])
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    folder = tmp_path / "a3"
    build = ["build", "--vision", sources.tower, "--text", sources.decoder, "--output", folder]
    code, said = run(*build, "--max-pixels", 512 * 512)
    assert (code, "manifest sha256" in said) == (0, True)
    assert ImageSpec.load(folder).max_pixels == 512 * 512
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (folder / file).read_bytes() == (sources.decoder / file).read_bytes()
    assert ArtemisVLMForConditionalGeneration.from_pretrained(folder).multi_modal_projector.fc1.weight.std() > 0.01
    assert run("verify", folder, "--against", sources.tower, sources.decoder)[0] == 0
    assert run(*build) == (1, f"error: {folder} already holds a model; give another output or remove it\n")
    assert run(*build[:-1], tmp_path / "b", "--projector", folder)[0] == 0
    assert run("verify", tmp_path / "b")[0] == 0
    assert all(
        torch.equal(a, b)
        for a, b in zip(graft.read_projector(folder).values(), graft.read_projector(tmp_path / "b").values())
    )

    other = shutil.copytree(sources.decoder, tmp_path / "other")
    first = sorted(other.glob("model-*"))[0]
    data = bytearray(first.read_bytes())
    data[-1] ^= 1
    first.write_bytes(data)
    code, said = run("verify", folder, "--against", sources.tower, other)
    assert (code, "differs from the sources" in said, "language_model." in said) == (1, True, True)
    (folder / "chat_template.jinja").write_text("changed")
    assert run("verify", folder) == (
        1,
        f"error: {folder} is not what was grafted: chat_template.jinja differs from the manifest\n",
    )
    assert "does not exist" in run("verify", tmp_path / "none")[1]
    assert run("build", "--vision", sources.decoder, "--text", sources.decoder, "--output", tmp_path / "c")[0] == 1
    (folder / "manifest.json").unlink()
    assert run("verify", folder) == (1, f"error: {folder} lacks manifest.json\n")


MEASURE = """
import resource, sys
from pathlib import Path
import torch
from artemis_vlm import tensorfile
stored = {f"{f.name}.{k}": t for f in map(Path, sys.argv[2:]) for k, t in tensorfile.stored_in(f).items()}
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
tensorfile.write(Path(sys.argv[1]), stored)
for tensor in stored.values():
    tensorfile.digest(tensor)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_a_trained_projector_brings_its_own_preprocessing(
    sources: graft.Sources, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It means nothing on other pixels; a folder of the published package, without a file, means CLIP's."""
    trained = ImageSpec(min_pixels=64 * 64, max_pixels=256 * 256, image_mean=(0.4, 0.5, 0.6), image_std=(0.2, 0.3, 0.4))
    small, published = tmp_path / "small", tmp_path / "published"
    for folder in (small, published):
        graft.write_projector(folder, sources, graft.new_projector(sources), trained)
    (published / PREPROCESSOR_FILE).unlink()
    ImageSpec(patch_size=14).save(shutil.copytree(small, tmp_path / "other"))

    def build(output: str, projector: str, *limits: str) -> int:
        line = ["build", "--vision", sources.tower, "--text", sources.decoder, "--projector", tmp_path / projector]
        return main([*map(str, line), "--output", str(tmp_path / output), *limits])

    for output, projector, limits, expected in (
        ("a", "small", [], trained),
        ("b", "small", ["--max-pixels", "16384"], trained.with_limits(None, 16384)),
        ("c", "published", [], ImageSpec(image_mean=CLIP_MEAN, image_std=CLIP_STD)),
    ):
        assert build(output, projector, *limits) == 0
        assert ImageSpec.load(tmp_path / output) == expected
    capsys.readouterr()
    assert (build("d", "other"), build("d", "small", "--max-pixels", "100")) == (1, 1)
    patches, pixels = capsys.readouterr().err.splitlines()
    assert "says patch_size 14, the vision tower 16" in patches
    assert "max_pixels is 100; it must reach min_pixels (4096)" in pixels


def test_copying_needs_no_memory(tmp_path: Path) -> None:
    """Two files with a 150 MB tensor each: copied and hashed within a few chunks of 16 MiB."""
    files = []
    for number in range(2):
        header = json.dumps({"w": {"dtype": "BF16", "shape": [75_000_000], "data_offsets": [0, 150_000_000]}}).encode()
        file = tmp_path / f"{number}.safetensors"
        with file.open("wb") as out:
            out.write(len(header).to_bytes(8, "little") + header)
            out.truncate(8 + len(header) + 150_000_000)
        files.append(str(file))
    measured = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "out.safetensors"), *files],
        cwd=Path(__file__).parent.parent,
        check=True,
        capture_output=True,
        text=True,
    )
    assert int(measured.stdout) < 64, "MiB"
    assert load_file(tmp_path / "out.safetensors")["0.safetensors.w"].shape == (75_000_000,)
