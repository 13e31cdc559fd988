"""The figures of a comparison: what is told of a model on a set of samples, and of the difference of two models.

Knows nothing of models and images: it begins where a model's losses and captions of each sample are there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from sacrebleu.metrics.base import Metric
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from pipelines.bootstrap import Array, Interval, Resampled, Value, ratio, resample


@dataclass(frozen=True)
class Row:
    """One model on one sample. Losses are sums, in nats, over the caption's tokens or those that touch a name.

    shuffled: with the image of another sample in place of its own
    there, told: objects that the truth names, and the model's caption
    """

    caption: str
    tokens: int
    loss: float
    shuffled: float
    name_tokens: int
    name_loss: float
    name_shuffled: float
    there: frozenset[str]
    told: frozenset[str]


@dataclass(frozen=True)
class Figure:
    """A figure of a model on a set: `value` of the sums of `stats`, which gives (N, K).

    unit: `nats` (a token), `share`, or `points` of 100
    lower: whether less is better; of_names: whether it needs names of objects
    """

    key: str
    title: str
    meaning: str
    unit: str
    stats: Callable[[Sequence[Row], Sequence[str]], Array]
    value: Value = ratio
    lower: bool = False
    of_names: bool = False


def _of_rows(*parts: Callable[[Row], float]) -> Callable[[Sequence[Row], Sequence[str]], Array]:
    return lambda rows, truths: np.array([[part(row) for part in parts] for row in rows], float)


def _of_texts(metric: Metric) -> dict[str, Any]:
    """sacrebleu's own sums and score, as its paired test uses them, so that it shares our resamples."""
    return {
        "stats": lambda rows, truths: np.array(
            metric._extract_corpus_statistics([r.caption for r in rows], [list(truths)]), float
        ),
        "value": lambda sums: float(metric._compute_score_from_stats(sums.tolist()).score),
    }


FIGURES: Final = (
    Figure(
        "loss", "Loss", "of the true caption, a token", "nats", lower=True,
        stats=_of_rows(lambda r: r.loss, lambda r: r.tokens),
    ),
    Figure(
        "gain", "Gain from the image", "how much worse with another sample's image; 0 is blind", "nats",
        stats=_of_rows(lambda r: r.shuffled - r.loss, lambda r: r.tokens),
    ),
    Figure(
        "name_loss", "Loss on names", "of the tokens that spell an object's name", "nats", lower=True, of_names=True,
        stats=_of_rows(lambda r: r.name_loss, lambda r: r.name_tokens),
    ),
    Figure(
        "name_gain", "Gain on names", "how much worse with another sample's image; 0 is blind", "nats", of_names=True,
        stats=_of_rows(lambda r: r.name_shuffled - r.name_loss, lambda r: r.name_tokens),
    ),
    Figure(
        "recall", "Objects named", "by the captions, of those that are there", "share", of_names=True,
        stats=_of_rows(lambda r: len(r.there & r.told), lambda r: len(r.there)),
    ),
    Figure(
        "precision", "Names that are right", "of those in the captions", "share", of_names=True,
        stats=_of_rows(lambda r: len(r.there & r.told), lambda r: len(r.told)),
    ),
    Figure("chrf", "chrF", "of captions against the truth, of 100", "points", **_of_texts(CHRF())),
    Figure("bleu", "BLEU", "of captions against the truth, of 100", "points", **_of_texts(BLEU())),
)  # fmt: skip


@dataclass(frozen=True)
class Difference:
    """Model `later` minus model `earlier` (indices); `better`: share of resamples in which the later is, NaN if unknown."""

    earlier: int
    later: int
    interval: Interval
    better: float


@dataclass(frozen=True)
class Compared:
    """A figure of all models on one set."""

    figure: Figure
    values: Sequence[Interval]
    differences: Sequence[Difference]


def compare_figure(
    figure: Figure, rows: Sequence[Sequence[Row]], truths: Sequence[str], drawn: npt.NDArray[np.int64]
) -> Compared:
    """Args: rows: (models, samples); drawn: of `draws`, shared by all models, so that differences are paired."""
    found = [resample(figure.stats(of_model, truths), figure.value, drawn) for of_model in rows]
    pairs = combinations(range(len(found)), 2)
    differences = [_difference(figure, a, b, found) for a, b in pairs]
    return Compared(figure, [f.interval() for f in found], differences)


def _difference(figure: Figure, earlier: int, later: int, found: Sequence[Resampled]) -> Difference:
    gained = found[later].values - found[earlier].values
    gained = gained[~np.isnan(gained)]
    better = float(np.mean((gained < 0) if figure.lower else (gained > 0))) if len(gained) else float("nan")
    return Difference(earlier, later, found[later].minus(found[earlier]), better)


def compared_json(compared: Compared) -> dict[str, Any]:
    return {
        "unit": compared.figure.unit,
        "lower_is_better": compared.figure.lower,
        "models": [_interval_json(i) for i in compared.values],
        "differences": [
            {"later": d.later, "earlier": d.earlier, **_interval_json(d.interval), "later_is_better": _known(d.better)}
            for d in compared.differences
        ],
    }


def _interval_json(interval: Interval) -> dict[str, float | None]:
    return {k: _known(v) for k, v in asdict(interval).items()}


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def shown(figure: Figure, interval: Interval, signed: bool = False) -> str:
    """`0.612 [0.580, 0.644]` in the figure's unit; shares in per cent; `n/a` for NaN."""

    def number(value: float) -> str:
        sign, value = "+" if signed else "", value + 0.0  # never -0
        if figure.unit == "share":
            return f"{100 * value:{sign}.1f}"
        return f"{value:{sign}.3f}" if figure.unit == "nats" else f"{value:{sign}.1f}"

    if math.isnan(interval.value):
        return "n/a"
    return f"{number(interval.value)} [{number(interval.low)}, {number(interval.high)}]"
