"""Typed metrics: what every component returns, and nobody logs but the loop.

A metric knows how to merge with its like, so micro-batches, ranks and steps combine without knowing what they measure.

Example:
    >>> a = {"reward": Mean(3.0, 2)}
    >>> b = {"reward": Mean(1.0, 2), "time/step": Last(0.5)}
    >>> resolve(merge(a, b))
    {'reward': 1.0, 'time/step': 0.5}
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias


@dataclass(frozen=True, slots=True)
class Mean:
    """A weighted mean: `total / weight`; merging adds both."""

    total: float
    weight: float = 1.0

    @property
    def value(self) -> float:
        return self.total / self.weight if self.weight else math.nan

    def merge(self, other: Mean) -> Mean:
        return Mean(self.total + other.total, self.weight + other.weight)


@dataclass(frozen=True, slots=True)
class Sum:
    """A total; merging adds."""

    value: float

    def merge(self, other: Sum) -> Sum:
        return Sum(self.value + other.value)


@dataclass(frozen=True, slots=True)
class Max:
    """A maximum; merging keeps the larger, and NaN wins so that it is never hidden."""

    value: float

    def merge(self, other: Max) -> Max:
        if math.isnan(self.value) or math.isnan(other.value):
            return Max(math.nan)
        return Max(max(self.value, other.value))


@dataclass(frozen=True, slots=True)
class Min:
    """A minimum; merging keeps the smaller, and NaN wins so that it is never hidden."""

    value: float

    def merge(self, other: Min) -> Min:
        if math.isnan(self.value) or math.isnan(other.value):
            return Min(math.nan)
        return Min(min(self.value, other.value))


@dataclass(frozen=True, slots=True)
class Last:
    """A reading; merging keeps the later one."""

    value: float

    def merge(self, other: Last) -> Last:
        return other


@dataclass(frozen=True, slots=True)
class Load:
    """How tokens are spread over experts, of a mixture's layers; merging adds the counts.

    Attributes:
        counts: `[layers][experts]`, how often each expert was chosen.
        statistic: `max_load`, the largest count over its layer's mean, in the layer where that is largest; `dead`, the
            share of experts that no token chose; `entropy`, in nats, of the choices of a layer, mean over layers: the
            log of the number of experts where all are chosen alike.

    Example:
        >>> Load(((3, 1, 0, 0), (1, 1, 1, 1)), "max_load").value
        3.0
    """

    counts: tuple[tuple[int, ...], ...]
    statistic: Literal["max_load", "dead", "entropy"]

    @property
    def value(self) -> float:
        layers = [layer for layer in self.counts if sum(layer)]
        if not layers:
            return math.nan
        if self.statistic == "max_load":
            return max(max(layer) * len(layer) / sum(layer) for layer in layers)
        if self.statistic == "dead":
            return sum(layer.count(0) for layer in layers) / sum(map(len, layers))
        return sum(map(_entropy, layers)) / len(layers)

    def merge(self, other: Load) -> Load:
        added = (tuple(map(sum, zip(*pair, strict=True))) for pair in zip(self.counts, other.counts, strict=True))
        return Load(tuple(added), self.statistic)


def _entropy(counts: Sequence[int]) -> float:
    shares = [count / sum(counts) for count in counts if count]
    return -sum(share * math.log(share) for share in shares)


Metric: TypeAlias = Mean | Sum | Max | Min | Last | Load
Metrics: TypeAlias = Mapping[str, Metric]


def merge(*parts: Metrics) -> dict[str, Metric]:
    """Combine metrics from several sources; a name must have one kind everywhere.

    Raises:
        TypeError: a name is a `Mean` in one part and a `Max` in another, say.
    """
    merged: dict[str, Metric] = {}
    for part in parts:
        for name, metric in part.items():
            present = merged.get(name)
            if present is None:
                merged[name] = metric
            elif type(present) is not type(metric):
                raise TypeError(f"metric {name!r} is both {type(present).__name__} and {type(metric).__name__}")
            else:
                merged[name] = present.merge(metric)  # type: ignore[arg-type]
    return merged


def resolve(metrics: Metrics) -> dict[str, float]:
    """The plain numbers, in the order in which the metrics came. A mean of nothing is no number, and is left out."""
    return {name: metric.value for name, metric in metrics.items() if not isinstance(metric, Mean) or metric.weight}
