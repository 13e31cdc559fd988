"""Builds an A3 folder file to file: any Qwen3-VL tower, any causal decoder, a projector, and a manifest.

Tensors of tower and decoder go from their sources' safetensors into the new folder byte for byte, a few megabytes at a
time; a model is built only without memory, for its names and shapes. `manifest.json` holds the sha256 of each frozen
tensor, so that anyone can check later that frozen meant frozen. Knows nothing of training.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

from artemis_vlm import chat, tensorfile
from artemis_vlm.configuration import ArtemisVLMConfig
from artemis_vlm.errors import CheckpointError, RunError
from artemis_vlm.image import PREPROCESSOR_FILE, ImageSpec, json_object
from artemis_vlm.modeling import ArtemisVLMForConditionalGeneration, ArtemisVLMProjector
from artemis_vlm.processing import VIDEO_TOKEN, check_spec, write_habits
from artemis_vlm.tensorfile import Digest, Held, Stored

MANIFEST_FILE: Final = "manifest.json"
INDEX_FILE: Final = "model.safetensors.index.json"
WEIGHTS_FILE: Final = "model.safetensors"
SHARD_NAME: Final = re.compile(r"model-[0-9]{5}-of-[0-9]{5}\.safetensors")
#: Of the names of a projector's tensors in an A3.
PROJECTOR_PREFIX: Final = "multi_modal_projector."
PROJECTOR_FILE: Final = "projector.safetensors"
SHARD_BYTES: Final = 5 * 10**9
HASHERS: Final = 4
#: What a decoder's folder gives to the A3 beside its weights.
TEXT_FILES: Final = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


@dataclass(frozen=True)
class Sources:
    """Local folders of the two frozen parts, with where they came from (`origin@revision`), for the record."""

    tower: Path
    decoder: Path
    tower_origin: str = ""
    decoder_origin: str = ""

    def tensors(self) -> dict[str, Stored]:
        """Every frozen tensor under its name in the A3, sorted by it."""
        tower = {f"visual.{name}": tensor for _, name, tensor in _tower_tensors(self.tower)}
        decoder = {f"language_model.{key}": tensor for key, tensor in stored_tensors(self.decoder).items()}
        return dict(sorted((tower | decoder).items()))

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The decoder's, read once: with a vocabulary of 131,072 that takes a second."""
        return load_tokenizer(self.decoder)

    def origins(self) -> dict[str, str]:
        return {"vision_tower": self.tower_origin or self.tower.name, "decoder": self.decoder_origin or self.decoder.name}


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """All tensors of a model folder.

    Raises:
        CheckpointError: no safetensors, a file missing or damaged.
    """
    index = folder / INDEX_FILE
    if index.exists():
        files = sorted({folder / f for f in json_object(index).get("weight_map", {}).values()})
    else:
        files = [folder / WEIGHTS_FILE]
    found: dict[str, Stored] = {}
    for file in files:
        if not file.exists():
            raise CheckpointError(f"{folder} lacks {file.name}; expected {WEIGHTS_FILE} or the files of {INDEX_FILE}")
        found |= tensorfile.stored_in(file)
    return found


def _tower_tensors(folder: Path) -> Iterator[tuple[str, str, Stored]]:
    """(key, name inside the tower, tensor) of a Qwen3-VL checkpoint, an A3, or a tower alone."""
    stored = stored_tensors(folder)
    prefix = next((p for p in ("model.visual.", "visual.", "") if f"{p}patch_embed.proj.weight" in stored), None)
    if prefix is None:
        raise CheckpointError(
            f"{folder} holds no Qwen3-VL vision tower: no model.visual.*, visual.* or patch_embed.* tensors"
        )
    for key, tensor in stored.items():
        if key.startswith(prefix):
            yield key, key.removeprefix(prefix), tensor


def tower_config(folder: Path) -> Qwen3VLVisionConfig:
    """The tower's configuration, from a whole Qwen3-VL's, an A3's, or its own `config.json`."""
    fields = json_object(folder / "config.json")
    return Qwen3VLVisionConfig(**fields.get("vision_config", fields))


def load_tower(folder: Path, dtype: torch.dtype, device: str | torch.device = "cpu") -> Qwen3VLVisionModel:
    """The vision tower alone, frozen; tensors go straight to the device.

    Raises:
        CheckpointError: tensors missing or of another shape than the configuration says.
    """
    with torch.device("meta"):
        tower = Qwen3VLVisionModel._from_config(tower_config(folder), dtype=dtype)
    state = {}
    for key, name, tensor in _tower_tensors(folder):
        with safe_open(tensor.file, "pt", device=str(device)) as opened:
            state[name] = opened.get_tensor(key).to(dtype)
    try:
        tower.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise CheckpointError(f"the tower in {folder} does not fit its config.json: {error}") from error
    tower.rotary_pos_emb = type(tower.rotary_pos_emb)(tower.config).to(device)  # computed, not stored
    return tower.requires_grad_(False).eval()


def load_frozen(
    sources: Sources, dtype: torch.dtype, device: str = "cpu", projector: Mapping[str, torch.Tensor] | None = None
) -> ArtemisVLMForConditionalGeneration:
    """Tower and decoder from their sources with a projector in float32, ready for alignment; only the latter trains.

    A new projector is initialised from torch's global seed.

    Raises:
        CheckpointError: tensors missing or of another shape than the configuration says.
    """
    config = graft_config(sources)
    decoder, report = AutoModelForCausalLM.from_pretrained(
        sources.decoder, dtype=dtype, device_map=device, output_loading_info=True
    )
    _check_loaded(report, sources.decoder)
    tower = load_tower(sources.tower, dtype, device)
    model = ArtemisVLMForConditionalGeneration(config, vision_model=tower, language_model=decoder)
    model.multi_modal_projector.to(device, torch.float32)
    if projector is not None:
        load_projector(model.multi_modal_projector, projector)
    model.set_training_stage("stage1")
    return model.eval()  # type: ignore[no-any-return]


def load_projector(projector: ArtemisVLMProjector, state: Mapping[str, torch.Tensor]) -> None:
    try:
        projector.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(f"the projector does not fit this tower and decoder: {error}") from error


def load_config(folder: Path) -> ArtemisVLMConfig:
    """An A3 folder's configuration.

    Raises:
        CheckpointError: the folder is not an A3.
    """
    fields = json_object(folder / "config.json")
    if fields.get("model_type") != ArtemisVLMConfig.model_type:
        raise CheckpointError(f"{folder} holds a {fields.get('model_type')} model; expected {ArtemisVLMConfig.model_type}")
    config: ArtemisVLMConfig = ArtemisVLMConfig.from_pretrained(folder)
    return config


def load_decoder(folder: Path, dtype: torch.dtype | None = None, device: str = "cpu") -> PreTrainedModel:
    """The decoder alone out of an A3 folder, frozen; None takes the dtype in which it is stored.

    Raises:
        CheckpointError: tensors missing, or of another shape than the configuration says.
    """
    prefix = "language_model."
    state: dict[str, torch.Tensor] = {}
    for name, tensor in stored_tensors(folder).items():
        if name.startswith(prefix):
            with safe_open(tensor.file, "pt") as opened:
                state[name.removeprefix(prefix)] = opened.get_tensor(name)
    if not state:
        raise CheckpointError(f"{folder} holds no decoder: no {prefix}* tensors")
    config = load_config(folder).text_config
    dtype = dtype or next(iter(state.values())).dtype
    decoder, report = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(
        None, config=config, state_dict=state, dtype=dtype, device_map=device, output_loading_info=True
    )
    _check_loaded(report, folder)
    if (folder / "generation_config.json").exists():
        decoder.generation_config = GenerationConfig.from_pretrained(folder)
    frozen: PreTrainedModel = decoder.requires_grad_(False).eval()
    return frozen


def _check_loaded(report: Mapping[str, Any], folder: Path) -> None:
    """Transformers draws what it does not find: a model that answers, in noise."""
    names = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
    if names:
        raise CheckpointError(f"the decoder in {folder} lacks {len(names)} tensors, {names[0]} among them")


def check_whole(config: ArtemisVLMConfig, tensors: Mapping[str, Stored | Held], projector: bool = True) -> None:
    """Compares names and shapes with those of the model that config describes; tensors beyond those are nobody's.

    A decoder that Transformers stores under other names (experts one by one, say) is compared only when it is loaded.

    Args:
        projector: whether its tensors are to be there.

    Raises:
        CheckpointError: one is missing or of another shape; the text names the first and their number.
    """
    with torch.device("meta"):
        model = ArtemisVLMForConditionalGeneration(config)
    if get_model_conversion_mapping(model, add_legacy=False):
        return
    tied: Mapping[str, str] = model.all_tied_weights_keys
    problems = []
    for name, expected in model.state_dict().items():
        if not projector and name.startswith(PROJECTOR_PREFIX):
            continue
        found = tensors.get(name)
        if found is None and tied.get(name) not in tensors:
            problems.append(f"{name} is missing")
        elif found is not None and tuple(found.shape) != tuple(expected.shape):
            problems.append(f"{name} has the shape {list(found.shape)} instead of {list(expected.shape)}")
    if problems:
        rest = f" ({len(problems) - 1} more)" if len(problems) > 1 else ""
        raise CheckpointError(f"the tensors are not those of the configurations: {problems[0]}{rest}")


def graft_config(sources: Sources) -> ArtemisVLMConfig:
    """The composite configuration of two sources.

    Raises:
        RunError: the decoder's tokenizer has no image placeholder.
        CheckpointError: the tower's own preprocessing disagrees with it, or the decoder is none.
    """
    vision = tower_config(sources.tower)
    text = _text_config(sources.decoder)
    image_id = chat.image_token_id(sources.tokenizer)
    if image_id >= text.vocab_size:
        raise CheckpointError(f"{chat.IMAGE_TOKEN} is token {image_id}, but the decoder has {text.vocab_size} embeddings")
    return ArtemisVLMConfig(
        vision_config=vision.to_dict(),
        text_config=text.to_dict(),
        image_token_id=image_id,
        video_token_id=sources.tokenizer.get_vocab().get(VIDEO_TOKEN, -1),
        image_turn_thinking=False,
        architectures=[ArtemisVLMForConditionalGeneration.__name__],
        dtype=text.dtype,
    )


def _text_config(folder: Path) -> PreTrainedConfig:
    config: PreTrainedConfig = AutoConfig.from_pretrained(folder)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or not hasattr(config, "hidden_size"):
        raise CheckpointError(f"{folder} holds a {config.model_type} model; expected a causal decoder of text alone")
    return config


def source_spec(
    sources: Sources, min_pixels: int | None = None, max_pixels: int | None = None, trained: Path | None = None
) -> ImageSpec:
    """The preprocessing of a graft: the tower's own file's; Qwen3-VL's 0.5/0.5 where the tower has none.

    Args:
        trained: folder of a trained projector, which takes that which it was trained on.
    """
    vision = tower_config(sources.tower)
    if trained is not None:
        spec = ImageSpec.load(trained)
    elif (sources.tower / PREPROCESSOR_FILE).exists():
        spec = ImageSpec.load(sources.tower)
    else:
        spec = ImageSpec(vision.patch_size, vision.temporal_patch_size, vision.spatial_merge_size)
    check_spec(spec, vision)
    try:
        return spec.with_limits(min_pixels, max_pixels)
    except ValueError as error:
        raise RunError(str(error)) from error


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} has no readable tokenizer: {error}") from error


def new_projector(sources: Sources, seed: int = 0) -> dict[str, torch.Tensor]:
    """The weights of an untrained projector, float32, drawn as Transformers draws a linear layer's."""
    text = _text_config(sources.decoder)
    projector = ArtemisVLMProjector(tower_config(sources.tower).out_hidden_size, text.hidden_size)
    generator = torch.Generator().manual_seed(seed)
    for parameter in projector.parameters():
        parameter.data.zero_()
        if parameter.ndim > 1:
            parameter.data.normal_(0, getattr(text, "initializer_range", 0.02), generator=generator)
    return projector.state_dict()


def write_model(output: Path, sources: Sources, projector: Mapping[str, torch.Tensor], spec: ImageSpec) -> str:
    """Writes a whole A3 folder: weights, manifest, tokenizer, image spec, processor, and last its `config.json`.

    The projector is stored in the decoder's dtype, in which it computes. Nothing is held but the projector and a few
    megabytes; a folder without `config.json` is unfinished.

    Returns:
        The manifest's sha256, which names the frozen parts.

    Raises:
        CheckpointError: the parts lack tensors or do not fit each other; nothing is written.
    """
    config, tensors = graft_config(sources), sources.tensors()
    dtype = config.text_config.dtype or torch.float32
    extra = {f"{PROJECTOR_PREFIX}{k}": Held(v.detach().to("cpu", dtype)) for k, v in projector.items()}
    check_whole(config, {**tensors, **extra})
    output.mkdir(parents=True, exist_ok=True)
    shards = (path for path in output.glob("model-*.safetensors") if SHARD_NAME.fullmatch(path.name))
    for stale in (output / "config.json", output / INDEX_FILE, output / WEIGHTS_FILE, *shards):
        stale.unlink(missing_ok=True)
    _write_shards(output, tensors, extra)
    for file in TEXT_FILES:
        if (sources.decoder / file).exists():
            shutil.copyfile(sources.decoder / file, output / file)
    spec.save(output)
    write_habits(output, config)
    digest = write_manifest(output, manifest_of(sources))
    config.save_pretrained(output)
    return digest


def write_projector(output: Path, sources: Sources, projector: Mapping[str, torch.Tensor], spec: ImageSpec) -> str:
    """The small form: projector, image spec and manifest, which names the sources of the rest."""
    output.mkdir(parents=True, exist_ok=True)
    save_file({k: v.detach().cpu().contiguous() for k, v in projector.items()}, output / PROJECTOR_FILE)
    spec.save(output)
    return write_manifest(output, manifest_of(sources))


def read_projector(folder: Path) -> dict[str, torch.Tensor]:
    """The projector's tensors, from the small form or from a whole A3."""
    small = folder / PROJECTOR_FILE
    prefix = "" if small.exists() else PROJECTOR_PREFIX
    stored = tensorfile.stored_in(small) if small.exists() else stored_tensors(folder)
    tensors = {}
    for key, tensor in stored.items():
        if key.startswith(prefix):
            with safe_open(tensor.file, "pt") as opened:
                tensors[key.removeprefix(prefix)] = opened.get_tensor(key)
    if not tensors:
        raise CheckpointError(f"{folder} holds no projector: neither {PROJECTOR_FILE} nor multi_modal_projector.* tensors")
    return tensors


def _write_shards(output: Path, frozen: Mapping[str, Stored], extra: Mapping[str, Held]) -> None:
    shards: list[dict[str, Stored | Held]] = [dict(extra)]
    room = SHARD_BYTES - sum(t.nbytes for t in extra.values())
    for name, tensor in frozen.items():
        if tensor.nbytes > room and shards[-1]:
            shards.append({})
            room = SHARD_BYTES
        shards[-1][name] = tensor
        room -= tensor.nbytes
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = WEIGHTS_FILE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensorfile.write(output / file, shard)
        weight_map |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        total = sum(t.nbytes for shard in shards for t in shard.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (output / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


# --- the manifest ----------------------------------------------------------------------------------------------------


def manifest_of(sources: Sources) -> dict[str, Any]:
    """sha256, dtype and shape of each frozen tensor in the sources under its name in the A3; sha256 of what is copied."""
    return {"sources": sources.origins(), "frozen": _digests(sources.tensors()), "files": _file_digests(sources.decoder)}


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> str:
    text = json.dumps(manifest, indent=1, sort_keys=True) + "\n"
    (folder / MANIFEST_FILE).write_text(text)
    return hashlib.sha256(text.encode()).hexdigest()


def frozen_digest(manifest: Mapping[str, Any]) -> str:
    """sha256 over a manifest's frozen tensors: which weights a projector was trained between, wherever they lie."""
    return hashlib.sha256(json.dumps(manifest["frozen"], sort_keys=True).encode()).hexdigest()


def verify(folder: Path, against: Sources | None = None) -> list[str]:
    """What is wrong with an A3 folder's frozen parts, in sentences in order of name; empty if all is well.

    Each tensor, and each file copied from the decoder, is compared with the folder's manifest, and the manifest with the
    sources if given. That the model's tensors are all there comes last.
    """
    manifest, tensors = json_object(folder / MANIFEST_FILE), stored_tensors(folder)
    stored = {k: t for k, t in tensors.items() if not k.startswith(PROJECTOR_PREFIX)}
    found = {"frozen": _digests(stored), "files": _file_digests(folder)}
    problems = _compare_manifests(manifest, found, "the manifest", "the folder")
    if against is not None:
        problems += _compare_manifests(manifest_of(against), manifest, "the sources", "the manifest")
    try:
        check_whole(load_config(folder), tensors)
    except CheckpointError as error:
        problems.append(str(error))
    return problems


def check_frozen(model: ArtemisVLMForConditionalGeneration, sources: Sources, manifest: Mapping[str, Any]) -> None:
    """Compares a model in memory with a manifest: in another dtype than the stored one, with what that makes of the sources.

    Raises:
        CheckpointError: a frozen tensor changed; the text names the first few.
    """
    expected = manifest["frozen"]
    state: dict[str, torch.Tensor] = model.state_dict()
    tensors = sources.tensors()

    def found(name: str) -> Digest:
        held, stored = state[name].detach().cpu(), tensors[name]
        if Held(held).dtype != stored.dtype and torch.equal(stored.load().to(held.dtype), held):
            return tensorfile.digest(stored)
        return tensorfile.digest(Held(held))

    names = [name for name in expected if name in state]
    with ThreadPoolExecutor(HASHERS) as pool:
        digests = dict(zip(names, pool.map(found, names)))
    problems = _compare(expected, digests, "the manifest", "the model in memory")
    if problems:
        raise CheckpointError(f"{len(problems)} frozen tensors are not what they were: {'; '.join(problems[:3])}")


def _digests(tensors: Mapping[str, Stored]) -> dict[str, Digest]:
    """Hashing releases the interpreter lock, so a few threads keep the disk busy."""
    with ThreadPoolExecutor(HASHERS) as pool:
        return dict(zip(tensors, pool.map(tensorfile.digest, tensors.values())))


def _file_digests(folder: Path) -> dict[str, str]:
    found = (folder / file for file in TEXT_FILES)
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in found if file.exists()}


def _compare_manifests(
    expected: Mapping[str, Any], found: Mapping[str, Any], where_expected: str, where_found: str
) -> list[str]:
    # Manifests from before files were listed have tensors alone.
    parts = [p for p in ("frozen", "files") if p in expected and p in found]
    return [line for p in parts for line in _compare(expected[p], found[p], where_expected, where_found)]


def _compare(expected: Mapping[str, Any], found: Mapping[str, Any], where_expected: str, where_found: str) -> list[str]:
    problems = []
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            problems.append(f"{name} is in {where_expected} but not in {where_found}")
        elif name not in expected:
            problems.append(f"{name} is in {where_found} but not in {where_expected}")
        elif expected[name] != found[name]:
            problems.append(f"{name} differs from {where_expected}")
    return problems
