"""Accuracy, pass@k and confidence intervals, from which samples of which row were correct.

`outcomes` is `[rows][samples]` booleans throughout; rows may have different numbers of samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Z_95 = 1.959963984540054
"""The 97.5 % point of the standard normal distribution."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A confidence interval of a fraction: `0 <= low <= high <= 1`.

    Example:
        Interval(low=0.31, high=0.52)
    """

    low: float
    high: float


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Unbiased estimate of the chance that at least one of k samples is correct: 1 - C(n-c, k) / C(n, k).

    Source: Chen et al. 2021, "Evaluating Large Language Models Trained on Code", equation 1.

    Raises:
        ValueError: k is not in 1..n, where the estimate does not exist, or c is not in 0..n.
    """
    if not 1 <= k <= num_samples:
        raise ValueError(f"pass@k with k = {k} needs at least k samples per row and k >= 1, got {num_samples} samples")
    if not 0 <= num_correct <= num_samples:
        raise ValueError(f"num_correct = {num_correct} is not between 0 and num_samples = {num_samples}")
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def mean_pass_at_k(outcomes: Sequence[Sequence[bool]], k: int) -> float:
    """Mean of `pass_at_k` over rows.

    Raises:
        ValueError: no rows, or a row with fewer than k samples.
    """
    _require_rows(outcomes)
    return math.fsum(pass_at_k(len(row), sum(row), k) for row in outcomes) / len(outcomes)


def accuracy(outcomes: Sequence[Sequence[bool]]) -> float:
    """Mean over rows of the mean over the row's samples.

    Raises:
        ValueError: no rows, or a row without samples.
    """
    _require_rows(outcomes)
    return math.fsum(_row_means(outcomes)) / len(outcomes)


def confidence_interval(outcomes: Sequence[Sequence[bool]]) -> Interval:
    """95 % confidence interval of `accuracy`.

    One sample per row: Wilson's score interval (Wilson 1927). Several: samples of one row are not independent, so rows
    are the clusters: a normal interval with the standard error of the row means (Miller 2024, "Adding Error Bars to
    Evals"), clipped to [0, 1]. Row means that are all equal, or a single row, would give an interval of width zero; the
    answer then is Wilson's interval with one trial per row.

    Raises:
        ValueError: no rows, or a row without samples.
    """
    _require_rows(outcomes)
    means = _row_means(outcomes)
    num_rows = len(means)
    mean = math.fsum(means) / num_rows
    if all(len(row) == 1 for row in outcomes) or len(set(means)) == 1:
        return _wilson(mean, num_rows)
    variance = math.fsum((value - mean) ** 2 for value in means) / (num_rows - 1)
    margin = Z_95 * math.sqrt(variance / num_rows)
    return Interval(max(0.0, mean - margin), min(1.0, mean + margin))


def _wilson(fraction: float, trials: int) -> Interval:
    z2 = Z_95**2
    center = (fraction + z2 / (2 * trials)) / (1 + z2 / trials)
    margin = Z_95 / (1 + z2 / trials) * math.sqrt(fraction * (1 - fraction) / trials + z2 / (4 * trials**2))
    # Rounding must not move the bound off 0 or 1, nor past the fraction itself.
    low = 0.0 if fraction == 0.0 else max(0.0, min(fraction, center - margin))
    high = 1.0 if fraction == 1.0 else min(1.0, max(fraction, center + margin))
    return Interval(low, high)


def _row_means(outcomes: Sequence[Sequence[bool]]) -> list[float]:
    return [sum(row) / len(row) for row in outcomes]


def _require_rows(outcomes: Sequence[Sequence[bool]]) -> None:
    if not outcomes:
        raise ValueError("there are no rows to average over; evaluate at least one row")
    if not all(len(row) for row in outcomes):
        raise ValueError("a row has no samples; every row needs at least one")


@dataclass(frozen=True, slots=True)
class Paired:
    """Two evaluations of the same rows.

    Attributes:
        rows: that both have.
        better, worse: rows in which the second is right more often than the first, and less often.
        p: chance of a difference at least as large if neither were better: the exact two-sided sign test, which with
            one sample per row is McNemar's (McNemar 1947; Dixon and Mood 1946).

    Example:
        Paired(rows=256, better=12, worse=2, p=0.0129)
    """

    rows: int
    better: int
    worse: int
    p: float


def paired(first: Sequence[Sequence[bool]], second: Sequence[Sequence[bool]]) -> Paired:
    """Compare row by row; `first[i]` and `second[i]` are the same row's samples.

    Raises:
        ValueError: different numbers of rows, no rows, or a row without samples.
    """
    for outcomes in (first, second):
        _require_rows(outcomes)
    pairs = list(zip(_row_means(first), _row_means(second), strict=True))
    better, worse = (sum(1 for a, b in pairs if sign * (b - a) > 0) for sign in (1, -1))
    differ = better + worse
    tail = sum(math.comb(differ, k) for k in range(min(better, worse) + 1))
    return Paired(len(pairs), better, worse, min(1.0, tail / 2 ** (differ - 1)) if differ else 1.0)
