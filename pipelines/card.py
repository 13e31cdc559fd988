"""The card of a trained model, README.md beside its weights: what `run.json` and `metrics.jsonl` hold, and how to use it.

Its front matter is what the Hugging Face hub reads, so the folder can be uploaded as it is. Paths of this machine stay
here: a local source is told by its last name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from huggingface_hub import EvalResult, ModelCardData

from pipelines.report import duration
from pipelines.storage import is_remote

CARD_FILE: Final = "README.md"
_HUB: Final = re.compile(r"(?:hf://)?(?:datasets/)?(?P<id>[\w.-]+/[\w.-]+)(?:@(?P<commit>[\w.-]+))?(?:/.*)?")


def model_card(run: Mapping[str, Any], records: Sequence[Mapping[str, Any]], manifest_sha256: str) -> str:
    """Markdown with YAML front matter.

    Args:
        run: of `run.json`, finished: with `started`, `finished` and `machine`.
        records: of `metrics.jsonl`.
        manifest_sha256: names the frozen tensors, as `graft.write_model` returns it.
    """
    config, tower, decoder = run["config"], run["sources"]["vision_tower"], run["sources"]["decoder"]
    name = Path(config["output"].rstrip("/")).name
    whole = config["export"] == "model"
    parts = [
        f"---\n{_front_matter(run, records, name)}\n---\n",
        f"# {name}\n",
        f"A vision-language model by composition: the vision tower of {_told(tower)}, a two-layer projector, and the "
        f"decoder {_told(decoder)}. Only the projector was trained. Tower and decoder are "
        f"{'byte for byte those of their sources' if whole else 'not in this folder'}; `manifest.json` has the sha256 of "
        f"each of their tensors, and its own is `{manifest_sha256}`.\n",
        "## Use\n",
        _usage() if whole else _usage_of_projector(tower, decoder),
        "## Training\n",
        _table(("what", "value"), _recipe(run, records)),
        "## Evaluation\n",
        f"Cross entropy in nats a token on {_held_out(config)}.\n",
        _table(
            ("step", "share of the steps", "eval loss"),
            [(s, f"{s / run['fingerprint']['steps']:.0%}", f"{loss:.4f}") for s, loss in _evaluations(records)],
        ),
        "## Run\n",
        _table(("what", "value"), _circumstances(run, records)),
        "## Sources\n",
        _table(("part", "source", "revision"), _sources(run)),
        "The licence of this model follows from those of its tower, its decoder and its data; add `license` to the lines at "
        "the top of this file before you upload it.\n",
    ]
    return "\n".join(parts)


def _front_matter(run: Mapping[str, Any], records: Sequence[Mapping[str, Any]], name: str) -> str:
    config, losses = run["config"], _evaluations(records)
    data = config["eval_data"] or config["data"]
    bases = [hub for hub in map(_hub_id, run["sources"].values()) if hub]
    trained_on = _hub_id(config["data"])
    results = [
        EvalResult(
            task_type="image-text-to-text",
            dataset_type=_hub_id(data) or "held-out",
            dataset_name=f"{_told(data)}, {config['held_out']} held-out samples",
            metric_type="loss",
            metric_name="cross entropy, nats a token",
            metric_value=round(losses[-1][1], 4),
        )
    ]
    card = ModelCardData(
        model_name=name,
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=["artemis_vlm", "vision-language-model"],
        base_model=bases or None,
        datasets=[trained_on] if trained_on else None,
        eval_results=results if losses else None,
    )
    return str(card)


def _usage() -> str:
    return """With the package `artemis-vlm` installed; no remote code.

```python
import artemis_vlm  # registers the classes
from transformers import pipeline

model = "."  # this folder, or the id that it was uploaded under
question = {"type": "text", "text": "Describe this image in detail."}
messages = [{"role": "user", "content": [{"type": "image", "image": "photo.jpg"}, question]}]
describe = pipeline("image-text-to-text", model=model)
(answer,) = describe(text=messages, max_new_tokens=150, do_sample=False, return_full_text=False)
print(answer["generated_text"])
```

`AutoModelForImageTextToText` and `AutoProcessor` load it as any other model.
"""


def _usage_of_projector(tower: str, decoder: str) -> str:
    return f"""This folder holds the projector alone. A whole model is made of it, without training, by

```bash
python jobs/graft.py build --vision {_told(tower)} --text {_told(decoder)} --projector . --output a3
```
"""


def _recipe(run: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> list[tuple[str, Any]]:
    config, steps = run["config"], run["fingerprint"]["steps"]
    last: Mapping[str, Any] = next((r for r in reversed(records) if "used" in r), {})
    return [
        ("steps", f"{steps:,} of {config['batch_size']} samples"),
        ("samples used; quarantined as unusable", f"{last.get('used', 0):,}; {last.get('quarantined', 0):,}"),
        ("optimizer", f"AdamW, weight decay {config['weight_decay']:g}, gradient norm clipped at {config['clip_norm']:g}"),
        ("learning rate", f"{config['learning_rate']:g}, warm-up over {config['warmup']:.0%} of the steps, cosine to 0"),
        ("computed in", f"{run['machine']['dtype']}; projector and moments in float32"),
        ("images", f"{config['min_pixels']:,} to {config['max_pixels']:,} pixels"),
        ("prompt", config["prompt"]),
        ("seed", config["seed"]),
    ]


def _held_out(config: Mapping[str, Any]) -> str:
    place = _told(config["eval_data"]) if config["eval_data"] else "the training data, which training skipped"
    return f"the first {config['held_out']:,} samples of {place}"


def _evaluations(records: Sequence[Mapping[str, Any]]) -> list[tuple[int, float]]:
    return [(r["step"], r["eval_loss"]) for r in records if "eval_loss" in r]


def _circumstances(run: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> list[tuple[str, Any]]:
    found, size = run["machine"], run["config"]["batch_size"]
    seconds = sum(size / r["samples_per_s"] for r in records if "samples_per_s" in r)
    samples = size * sum("samples_per_s" in r for r in records)
    wall = (datetime.fromisoformat(run["finished"]) - datetime.fromisoformat(run["started"])).total_seconds()
    workers = f"{found['workers']} x " if found["workers"] > 1 else ""
    return [
        ("hardware", f"{workers}{found['device']}"),
        ("started, finished", f"{run['started']}, {run['finished']}"),
        ("wall clock, pauses and evaluations included", duration(wall)),
        ("time in training steps", f"{duration(seconds)}, {samples / seconds:.2f} samples/s" if seconds else "none"),
        ("versions", ", ".join(f"{k} {v}" for k, v in found["versions"].items())),
    ]


def _sources(run: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    rows = [(part.replace("_", " "), _told(uri), _commit(uri)) for part, uri in run["sources"].items()]
    for key, uri in (("data", run["config"]["data"]), ("eval_data", run["config"]["eval_data"])):
        found = run[key]
        commit = found["commit"] or f"{found['shards']} shards, names sha256 {found['names'][:16]}"
        rows += [(key.replace("_", " "), _told(uri), commit)] if uri else []
    return rows


def _hub_id(uri: str) -> str:
    """ORG/NAME of what came from the hub."""
    found = _HUB.fullmatch(uri)
    local = not uri.startswith("hf://") and (is_remote(uri) or Path(uri).exists())
    return found["id"] if found and not local else ""


def _commit(uri: str) -> str:
    found = _HUB.fullmatch(uri)
    return found["commit"] or "" if found and _hub_id(uri) else ""


def _told(uri: str) -> str:
    return _hub_id(uri) or (uri if is_remote(uri) else Path(uri).name)


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    def line(cells: Sequence[Any]) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    return "\n".join([line(head), "|" + "---|" * len(head), *map(line, rows)]) + "\n"
