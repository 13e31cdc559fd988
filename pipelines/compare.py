"""Models side by side on held-out data: losses, captions, and whether they look at the image.

Every figure has a confidence interval, and every difference one of its own from the same resamples of the samples.
The result is a pure function of models, data and seed, so the same command writes the same bytes again. Runs in this
process; knows nothing of Ray.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import sacrebleu
import torch
import torch.nn.functional as F
import transformers
from transformers import PreTrainedTokenizerBase

from artemis_vlm import ArtemisVLMForConditionalGeneration, chat, graft
from artemis_vlm.configuration import ArtemisVLMConfig
from artemis_vlm.errors import CheckpointError, RunError
from artemis_vlm.examples import Example
from artemis_vlm.frozen import compute_dtype, unpacked_attention
from artemis_vlm.generation import caption
from artemis_vlm.image import ImageSpec
from artemis_vlm.modeling import normalize
from pipelines.bootstrap import RESAMPLES, Array, draws
from pipelines.data import Encoder, Position, permutation
from pipelines.figures import FIGURES, Compared, Row, compare_figure, compared_json, shown
from pipelines.machine import check_device
from pipelines.names import Names
from pipelines.shards import RawSample, find_shards, open_rows
from pipelines.storage import RunFolder, fetch_model

#: Captions written at once. More than one for speed, few enough for a laptop's memory.
BATCH: Final = 8
#: Beyond any caption; that the decoder can go so far is its own affair.
MAX_TOKENS: Final = 1 << 20


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """What is compared on what."""

    model: tuple[str, ...]
    """Give it for each model: a model folder, the small form that `--export projector` writes, or a checkpoint of a run;
    folder, s3:// URI or hub id. Differences are later ones minus earlier ones."""
    data: tuple[str, ...]
    """Give it for each set of captioned images that no model was trained on: shards as for training."""
    output: str
    """Where the page and its figures go; folder or s3:// URI."""
    names: str = ""
    """A file with the objects that captions may name, a line each: `cat, cats`."""
    count: int = 100
    """Samples of each set: its first, in file order."""
    max_new_tokens: int = 150
    """Most tokens of a caption."""
    prompt: str = "Describe this image in detail."
    """What the user says beside each image."""
    seed: int = 0
    """Decides whose image stands in for whose, and the resamples."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where the models run, one after the other."""
    dtype: str = "auto"
    """bfloat16, float32, or auto: bfloat16 except on CPUs without it."""

    def __post_init__(self) -> None:
        for name in ("model", "data", "output"):
            if not getattr(self, name):
                raise RunError(f"the comparison has no {name}; give --{name} (a folder or a URI)")
        if self.count < 2:
            raise RunError(f"count is {self.count}; at least 2 samples are needed, so that images can be exchanged")
        if self.max_new_tokens < 1:
            raise RunError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1")
        check_device(self.device)
        if self.dtype not in ("bfloat16", "float32", "auto"):
            raise RunError(f"dtype is {self.dtype}; expected bfloat16, float32 or auto")

    @property
    def torch_dtype(self) -> torch.dtype:
        return compute_dtype(self.device) if self.dtype == "auto" else getattr(torch, self.dtype)


# --- what is compared: found and checked before any weight is loaded -------------------------------------------------


@dataclass(frozen=True)
class Entrant:
    """A model to compare, on this machine; `sources` are those of a projector that comes alone."""

    name: str
    uri: str
    folder: Path
    sources: graft.Sources | None
    encoder: Encoder

    def load(self, dtype: torch.dtype, device: str) -> ArtemisVLMForConditionalGeneration:
        if self.sources:
            return graft.load_frozen(self.sources, dtype, device, graft.read_projector(self.folder))
        return load_a3(self.folder, dtype, device)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.encoder.tokenizer


def load_a3(folder: Path, dtype: torch.dtype, device: str) -> ArtemisVLMForConditionalGeneration:
    """A whole model folder; Transformers alone would fill in what is missing with random numbers.

    Raises:
        CheckpointError: tensors are missing or of another shape.
    """
    model, found = ArtemisVLMForConditionalGeneration.from_pretrained(
        folder, dtype=dtype, device_map=device, output_loading_info=True
    )
    if wrong := sorted(map(str, [*found["missing_keys"], *found["mismatched_keys"]])):
        raise CheckpointError(f"{folder} lacks {len(wrong)} tensors or has them in another shape, {wrong[0]} first")
    return model.eval()  # type: ignore[no-any-return]


def find_entrants(uris: Sequence[str], prompt: str) -> list[Entrant]:
    """Fetches the models and checks that they can be compared.

    Raises:
        ArtemisError: something is missing or damaged, or two models have different tokenizers.
    """
    entrants = [_find_entrant(uri, name, prompt) for uri, name in zip(uris, short_names(uris))]
    first = entrants[0]
    for other in entrants[1:]:
        if other.tokenizer.get_vocab() != first.tokenizer.get_vocab():
            raise RunError(
                f"{first.uri} and {other.uri} have different vocabularies, so their losses a token cannot be compared; "
                "compare models of one decoder family"
            )
    return entrants


def _find_entrant(uri: str, name: str, prompt: str) -> Entrant:
    folder = fetch_model(uri, ("config.json", graft.PROJECTOR_FILE)).path
    if (folder / graft.PROJECTOR_FILE).exists():
        sources = _sources_of(uri, folder)
        config, tokenizer = graft.graft_config(sources), sources.tokenizer
        graft.read_projector(folder)  # whole, or a sentence
    else:
        sources = None
        kind = _model_type(folder / "config.json")
        if kind != ArtemisVLMConfig.model_type:
            raise CheckpointError(
                f"{uri} holds a {kind} model; expected an A3 ({ArtemisVLMConfig.model_type}) or a projector"
            )
        config, tokenizer = ArtemisVLMConfig.from_pretrained(folder), graft.load_tokenizer(folder)
        graft.stored_tensors(folder)  # the same
    thinking = chat.image_thinking(True, config.image_turn_thinking)
    frame = chat.CaptionFrame.build(tokenizer, prompt, thinking)
    return Entrant(name, uri, folder, sources, Encoder(ImageSpec.load(folder), tokenizer, frame, MAX_TOKENS))


def _model_type(path: Path) -> Any:
    try:
        return json.loads(path.read_text()).get("model_type")
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error


def _sources_of(uri: str, folder: Path) -> graft.Sources:
    """The frozen parts of a projector, from its manifest or, of a checkpoint, from its run; proven to be the same."""
    run = folder.parent.parent / "run.json"
    try:
        if (folder / graft.MANIFEST_FILE).exists():
            manifest = json.loads((folder / graft.MANIFEST_FILE).read_text())
            origins, expected = manifest["sources"], graft.frozen_digest(manifest)
        elif run.exists():
            origins = json.loads(run.read_text())["sources"]
            expected = json.loads((folder / "state.json").read_text())["run"]["frozen_weights"]
        else:
            raise CheckpointError(f"the projector {uri} has no {graft.MANIFEST_FILE} that names its tower and decoder")
        parts = [fetch_model(origins[part]) for part in ("vision_tower", "decoder")]
    except (ValueError, KeyError, TypeError, OSError) as error:
        if isinstance(error, CheckpointError):
            raise CheckpointError(f"the tower and decoder of the projector {uri} cannot be had: {error}") from error
        raise CheckpointError(f"the projector {uri} has a damaged manifest or run: {error!r}") from error
    sources = graft.Sources(parts[0].path, parts[1].path, parts[0].origin, parts[1].origin)
    if graft.frozen_digest(graft.manifest_of(sources)) != expected:
        raise CheckpointError(
            f"the projector {uri} was trained between other weights than {parts[0].origin} and {parts[1].origin} hold now"
        )
    return sources


def short_names(uris: Sequence[str]) -> list[str]:
    """The shortest ends of paths that tell them apart; equal ones are numbered."""
    parts = [[p for p in uri.replace("://", "/").split("/") if p not in ("", ".")] or [uri] for uri in uris]
    distinct = len({tuple(p) for p in parts})
    depth = next((d for d in range(1, 64) if len({tuple(p[-d:]) for p in parts}) == distinct), 64)
    names = ["/".join(p[-depth:]) for p in parts]
    return [f"{n} ({names[:i].count(n) + 1})" if names.count(n) > 1 else n for i, n in enumerate(names)]


@dataclass(frozen=True)
class SampleSet:
    """Captioned images; `left_out`: (uid, reason) of those that cannot be used."""

    name: str
    uri: str
    samples: Sequence[RawSample]
    left_out: Sequence[tuple[str, str]]

    @property
    def truths(self) -> list[str]:
        return [raw.text.decode().strip() for raw in self.samples]


def find_sets(uris: Sequence[str], count: int, encoder: Encoder) -> list[SampleSet]:
    """The first `count` samples of each set.

    Raises:
        RunError: nothing there, or fewer than two of them can be used.
    """
    return [_find_set(uri, name, count, encoder) for uri, name in zip(uris, short_names(uris))]


def _find_set(uri: str, name: str, count: int, encoder: Encoder) -> SampleSet:
    samples: list[RawSample] = []
    for shard in find_shards(uri):
        if len(samples) < count:
            with open_rows(shard) as rows:
                samples += [rows[i] for i in range(min(count - len(samples), len(rows)))]
    checked = list(encoder.candidates([(Position(), raw) for raw in samples]))
    used = [raw for raw, candidate in zip(samples, checked) if candidate.example]
    if len(used) < 2:
        reason = next((f", the first because {c.error}" for c in checked if c.error), "")
        raise RunError(f"the data {uri} has {len(used)} usable samples of {len(samples)}{reason}; at least 2 are needed")
    return SampleSet(name, uri, used, [(c.uid, c.error) for c in checked if not c.example])


# --- what is measured ------------------------------------------------------------------------------------------------


def measure(
    entrant: Entrant,
    model: ArtemisVLMForConditionalGeneration,
    found: SampleSet,
    config: CompareConfig,
    names: Names | None,
) -> list[Row]:
    """Losses and captions of one model on each sample of a set."""
    encoder = entrant.encoder
    examples = [c.example for c in encoder.candidates([(Position(), raw) for raw in found.samples]) if c.example]
    captions: list[str] = []
    for start in range(0, len(examples), BATCH):
        group = examples[start : start + BATCH]
        captions += caption(model, entrant.tokenizer, group, encoder.spec, config.max_new_tokens)
    rows = []
    for example, other, text, truth in zip(examples, exchanged(examples, config.seed), captions, found.truths):
        own = token_losses(model, example, encoder.spec)
        foreign = token_losses(model, other, encoder.spec)
        spelled = name_tokens(entrant.tokenizer, truth, names, len(own))
        there, told = (frozenset(names.in_text(t)) if names else frozenset() for t in (truth, text))
        sums = (own.sum(), foreign.sum(), own[spelled].sum(), foreign[spelled].sum())
        loss, shuffled, name_loss, name_shuffled = map(float, sums)
        rows.append(Row(text, len(own), loss, shuffled, int(spelled.sum()), name_loss, name_shuffled, there, told))
    return rows


@torch.no_grad()
def token_losses(model: ArtemisVLMForConditionalGeneration, example: Example, spec: ImageSpec) -> Array:
    """Of each target token: float64 (S,), in nats. One sample at a time through the model's own forward."""
    device = model.multi_modal_projector.fc1.weight.device
    ids = torch.from_numpy(example.input_ids.astype(np.int64)).to(device)
    with unpacked_attention(model.visual, model.language_model):
        logits = model(
            input_ids=ids[None],
            pixel_values=normalize(torch.from_numpy(example.patches).to(device), spec),
            image_grid_thw=torch.tensor([[1, *example.grid]], device=device),
            logits_to_keep=example.n_targets + 1,
            use_cache=False,
        ).logits[0, :-1]
    losses = F.cross_entropy(logits.float(), ids[example.n_prompt :], reduction="none")
    return losses.double().cpu().numpy()


def exchanged(examples: Sequence[Example], seed: int) -> list[Example]:
    """The same captions, each with the image of another sample: along one random cycle, so none keeps its own."""
    order = permutation(len(examples), seed, 0, "exchanged images")
    partner = dict(zip(order.tolist(), np.roll(order, -1).tolist()))
    found = []
    for index, example in enumerate(examples):
        other = examples[partner[index]]
        ids = np.concatenate([other.input_ids[: other.n_prompt], example.input_ids[example.n_prompt :]])
        found.append(Example(example.uid, ids, other.n_prompt, other.patches, other.grid))
    return found


def name_tokens(tokenizer: PreTrainedTokenizerBase, text: str, names: Names | None, targets: int) -> np.ndarray:
    """bool (targets,): which of a caption's tokens touch a name; the turn's end, behind them, does not."""
    flags = np.zeros(targets, bool)
    spans = names.spans(text) if names else []
    for index, (start, end) in enumerate(chat.text_offsets(tokenizer, text)):
        flags[index] = any(start < e and s < end for s, e in spans)
    return flags


# --- the whole -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SetResult:
    """All of one set: `rows` is (models, samples); `examples` hold the images as the first model sees them."""

    found: SampleSet
    examples: Sequence[Example]
    rows: Sequence[Sequence[Row]]
    figures: Sequence[Compared]


@dataclass(frozen=True)
class Comparison:
    """All of a comparison."""

    config: CompareConfig
    entrants: Sequence[Entrant]
    names: Names | None
    sets: Sequence[SetResult]

    def to_json(self) -> dict[str, Any]:
        """The figures and every sample's; NaN is null."""
        config = asdict(self.config)
        return {
            "models": [{"name": e.name, "uri": e.uri} for e in self.entrants],
            "settings": {k: config[k] for k in ("count", "max_new_tokens", "prompt", "seed", "device", "names")}
            | {"dtype": str(self.config.torch_dtype).removeprefix("torch."), "resamples": RESAMPLES},
            "versions": {p.__name__: p.__version__ for p in (torch, transformers, sacrebleu)},
            "sets": {result.found.name: _set_json(result) for result in self.sets},
        }


def _set_json(result: SetResult) -> dict[str, Any]:
    samples = [
        {"uid": raw.uid, "truth": truth, "models": [_row_json(of_model[i]) for of_model in result.rows]}
        for i, (raw, truth) in enumerate(zip(result.found.samples, result.found.truths))
    ]
    return {
        "uri": result.found.uri,
        "left_out": [{"uid": uid, "reason": reason} for uid, reason in result.found.left_out],
        "figures": {c.figure.key: compared_json(c) for c in result.figures},
        "samples": samples,
    }


def _row_json(row: Row) -> dict[str, Any]:
    return {**asdict(row), "there": sorted(row.there), "told": sorted(row.told)}


def compare(config: CompareConfig, say: Callable[[str], None] = print) -> Comparison:
    """Measures all models on all sets; `say` is told where it is.

    Raises:
        ArtemisError: before any weight is loaded, if models, data, names or output do not fit.
    """
    names = Names.load(Path(config.names)) if config.names else None
    entrants = find_entrants(config.model, config.prompt)
    sets = find_sets(config.data, config.count, entrants[0].encoder)
    RunFolder(config.output).discard()  # says if nothing can be written there
    rows: list[list[list[Row]]] = [[] for _ in sets]  # by set, model, sample
    for entrant in entrants:
        say(f"{entrant.name}: loading")
        model = entrant.load(config.torch_dtype, config.device)
        for of_set, found in zip(rows, sets):
            say(f"{entrant.name}: {len(found.samples)} samples of {found.name}")
            of_set.append(measure(entrant, model, found, config, names))
        del model
        gc.collect()  # two models of 25 GB do not fit at once
    figures = [f for f in FIGURES if names or not f.of_names]
    results = []
    for found, of_set in zip(sets, rows):
        drawn = draws(len(found.samples), config.seed)
        compared = [compare_figure(figure, of_set, found.truths, drawn) for figure in figures]
        examples = [c.example for c in entrants[0].encoder.candidates([(Position(), r) for r in found.samples]) if c.example]
        results.append(SetResult(found, examples, of_set, compared))
    return Comparison(config, entrants, names, results)


def summary(comparison: Comparison) -> str:
    """The figures in lines for a terminal."""
    width = max(len(e.name) for e in comparison.entrants)
    lines = []
    for result in comparison.sets:
        lines += ["", f"{result.found.name}: {len(result.found.samples)} samples"]
        for compared in result.figures:
            lines.append(f"  {compared.figure.title}, {compared.figure.meaning}")
            for entrant, interval in zip(comparison.entrants, compared.values):
                lines.append(f"    {entrant.name:<{width}}  {shown(compared.figure, interval)}")
            for d in compared.differences:
                names = f"{comparison.entrants[d.later].name} - {comparison.entrants[d.earlier].name}"
                lines.append(f"    {names}  {shown(compared.figure, d.interval, signed=True)}")
    return "\n".join(lines)
