"""Means with confidence: the paired bootstrap over samples. Knows nothing of models; counts and sums alone.

Every figure here is a function of sums over samples (of losses and tokens, of n-gram matches), so one draw of samples
serves all figures of all models, and their differences are paired.

Shapes: N samples, K sums that a figure is made of, R resamples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
#: The value of a figure from its sums (K,).
Value = Callable[[Array], float]

RESAMPLES: Final = 2000


@dataclass(frozen=True, slots=True)
class Interval:
    """A value with the ends of its 95 % confidence interval; NaN where nothing can be said."""

    value: float
    low: float
    high: float

    @property
    def clear(self) -> bool:
        """Whether zero lies outside."""
        return bool(self.low > 0 or self.high < 0)


def draws(samples: int, seed: int, resamples: int = RESAMPLES) -> npt.NDArray[np.int64]:
    """How often each sample is in each resample: (R, N), rows sum to N.

    A pure function of its arguments for every version of numpy: it ranks random words itself.
    """
    words = np.random.PCG64(seed).random_raw(resamples * samples).reshape(resamples, samples)
    chosen = (words % np.uint64(samples)).astype(np.int64)
    flat = chosen + np.arange(resamples)[:, None] * samples
    return np.bincount(flat.ravel(), minlength=resamples * samples).reshape(resamples, samples).astype(np.int64)


def ratio(sums: Array) -> float:
    """The first sum over the second."""
    return float(sums[0] / sums[1]) if sums[1] else float("nan")


@dataclass(frozen=True)
class Resampled:
    """A figure: of all samples, and of each resample (R,)."""

    value: float
    values: Array

    def interval(self) -> Interval:
        return _interval(self.value, self.values)

    def minus(self, other: Resampled) -> Interval:
        """The difference of two models on the same resamples."""
        return _interval(self.value - other.value, self.values - other.values)


def resample(stats: Array, value: Value, drawn: npt.NDArray[np.int64]) -> Resampled:
    """The figure over all samples and over each resample.

    Args:
        stats: (N, K), what each sample adds to the sums.
        drawn: of `draws`.
    """
    sums = drawn @ stats
    return Resampled(value(stats.sum(0)), np.array([value(row) for row in sums]))


def _interval(value: float, values: Array) -> Interval:
    known = values[~np.isnan(values)]
    if not len(known):
        return Interval(value, float("nan"), float("nan"))
    low, high = np.percentile(known, (2.5, 97.5))
    return Interval(value, float(low), float(high))
