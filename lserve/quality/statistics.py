"""Intervals for shares and for paired differences. No torch."""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

Z = 1.959964
"""Two-sided 95 % of a normal distribution."""

RESAMPLES = 10_000


@dataclass(frozen=True, slots=True)
class Interval:
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float

    def scaled(self, factor: float) -> "Interval":
        """The same in another unit."""
        return Interval(self.value * factor, self.low * factor, self.high * factor)


def share(scores: Sequence[float]) -> Interval:
    """The mean of scores between 0 and 1, with Wilson's interval. Raises ValueError for none."""
    if not scores:
        raise ValueError("a share of nothing has no value")
    total, mean = len(scores), sum(scores) / len(scores)
    spread = Z * math.sqrt(mean * (1 - mean) / total + Z * Z / (4 * total * total))
    centre, scale = mean + Z * Z / (2 * total), 1 + Z * Z / total
    low, high = max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)
    return Interval(mean, min(low, mean), max(high, mean))


def paired_difference(
    differences: Sequence[float], clusters: Sequence[Hashable], seed: int = 0, resamples: int = RESAMPLES
) -> Interval:
    """The mean of paired differences, with a bootstrap interval that draws whole clusters.

    clusters: which one each difference belongs to. Questions about one document share what it makes hard, so they are
    drawn together. Where no pair differs the bootstrap knows nothing; then the interval is as wide as what so many
    pairs can rule out (Wilson's for none of them). Raises ValueError for nothing.
    """
    if not differences:
        raise ValueError("a difference of nothing has no value")
    if len(differences) != len(clusters):
        raise ValueError(f"{len(differences)} differences, but {len(clusters)} clusters")
    mean = sum(differences) / len(differences)
    if not any(differences):
        bound = share([0.0] * len(differences)).high
        return Interval(0.0, -bound, bound)
    index = {cluster: number for number, cluster in enumerate(dict.fromkeys(clusters))}
    numbers = np.array([index[cluster] for cluster in clusters])
    sums = np.bincount(numbers, weights=np.array(differences), minlength=len(index))
    counts = np.bincount(numbers, minlength=len(index))
    drawn = np.random.default_rng(seed).integers(len(index), size=(resamples, len(index)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return Interval(mean, min(float(low), mean), max(float(high), mean))
