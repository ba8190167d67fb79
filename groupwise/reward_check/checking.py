"""Answers through the scorer, and what is to be seen of them."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from groupwise.metrics import resolve
from groupwise.reward_check.sources import Answer, Answers, probes
from groupwise.rewards.scorer import RewardScorer, Score
from groupwise.types import Prompt

BINS = 10


@dataclass(frozen=True, slots=True)
class Scored:
    """One answer with what it earned."""

    prompt: Prompt
    answer: Answer
    score: Score


@dataclass(frozen=True, slots=True)
class RewardSummary:
    """One reward over all given answers.

    Attributes:
        count: values that it gave; `none`: answers that it does not apply to; `failed`: those that it failed on.
        std: with n - 1.
        counts: of `BINS` bins from `low` to `high`.
        at_high: share of the values that are the highest.
        equal_groups: share of groups of two and more in which it tells no answer from another; None: no such group.
        with_length: Pearson's correlation with the answers' length; None where either does not vary.
        causes: of failures, the commonest first.
        seconds: inside its calls, by answer.
        paid: the mean that each probe earned, by its name.
    """

    name: str
    weight: float
    count: int
    none: int
    failed: int
    mean: float
    std: float
    low: float
    high: float
    counts: tuple[int, ...]
    at_high: float
    equal_groups: float | None
    with_length: float | None
    causes: tuple[tuple[str, int], ...]
    seconds: float
    paid: dict[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True, slots=True)
class Disagreement:
    """Two rewards that judge an answer most differently, each by its own spread."""

    first: str
    second: str
    distance: float
    scored: Scored


@dataclass(frozen=True, slots=True)
class RewardCheck:
    """Everything that was seen.

    Attributes:
        correlations: of each pair of rewards.
        best, worst: by the weighted sum.
    """

    answers: Answers
    scored: Sequence[Scored]
    rewards: Sequence[RewardSummary]
    correlations: dict[tuple[str, str], float]
    disagreements: Sequence[Disagreement]
    best: Sequence[Scored]
    worst: Sequence[Scored]


async def check_rewards(scorer: RewardScorer, answers: Answers, *, examples: int = 3) -> RewardCheck:
    """Score every answer, and the probes beside them.

    Args:
        examples: best, worst and most disputed answers that are kept.

    Raises:
        RewardError, ConfigError, DataError: as `RewardScorer.score`.
    """
    scorer.check_sources({prompt.data_source for prompt, _ in answers.groups})
    groups = [await _score(scorer, prompt, given) for prompt, given in answers.groups if given]
    scored = [one for group in groups for one in group]
    taken = resolve(scorer.metrics())
    tried = [one for prompt, given in answers.groups for one in await _score(scorer, prompt, probes(prompt, given))]
    summaries = [
        summarise(name, scorer.weights[name], groups, tried, seconds=taken[f"rewards/{name}/seconds"])
        for name in scorer.names
    ]
    different = {(one.prompt.uid, one.answer.text): one for one in scored if one.score.reward is not None}
    ranked = sorted(different.values(), key=_reward)
    return RewardCheck(
        answers=answers,
        scored=scored,
        rewards=summaries,
        correlations=_correlations(scorer.names, scored),
        disagreements=_disagreements(summaries, scored)[:examples],
        best=ranked[::-1][:examples],
        worst=ranked[:examples],
    )


def _reward(one: Scored) -> float:
    assert one.score.reward is not None
    return one.score.reward


async def _score(scorer: RewardScorer, prompt: Prompt, given: Sequence[Answer]) -> list[Scored]:
    scores = await scorer.score(prompt, [answer.rollout for answer in given])
    return [Scored(prompt, answer, score) for answer, score in zip(given, scores, strict=True)]


def summarise(
    name: str, weight: float, groups: Sequence[Sequence[Scored]], tried: Sequence[Scored], *, seconds: float
) -> RewardSummary:
    """One reward over groups of answers, and over the probes.

    Args:
        seconds: inside its calls, all of them.
    """
    scored = [one for group in groups for one in group]
    failures = Counter(cause for one in scored if (cause := _cause(one, name)))
    judged = [(one, value) for one in scored if (value := one.score.rewards.get(name)) is not None]
    values = [value for one, value in judged if not _cause(one, name)]
    lengths = [float(one.answer.length) for one, _ in judged if not _cause(one, name)]
    low, high = (min(values), max(values)) if values else (0.0, 0.0)
    spreads = [
        len({one.score.rewards.get(name) for one in group}) == 1
        for group in groups
        if len(group) > 1 and any(one.score.rewards.get(name) is not None for one in group)
    ]
    paid: dict[str, list[float]] = {}
    for one in tried:
        value = one.score.rewards.get(name)
        if value is not None and not _cause(one, name):
            paid.setdefault(one.answer.kind, []).append(value)
    return RewardSummary(
        name=name,
        weight=weight,
        count=len(values),
        none=sum(one.score.rewards.get(name) is None and not _cause(one, name) for one in scored),
        failed=sum(failures.values()),
        mean=statistics.fmean(values) if values else 0.0,
        std=statistics.stdev(values) if len(values) > 1 else 0.0,
        low=low,
        high=high,
        counts=_histogram(values, low, high),
        at_high=sum(value == high for value in values) / len(values) if values else 0.0,
        equal_groups=sum(spreads) / len(spreads) if spreads else None,
        with_length=_correlation(values, lengths),
        causes=tuple(failures.most_common(3)),
        seconds=seconds / len(scored) if scored else 0.0,
        paid={kind: statistics.fmean(some) for kind, some in paid.items()},
    )


def _cause(one: Scored, name: str) -> str:
    """Why the reward failed on an answer, or ""."""
    start = f"reward {name!r} failed: "
    return next((part.removeprefix(start) for part in one.score.cause.split("; ") if part.startswith(start)), "")


def _histogram(values: Sequence[float], low: float, high: float) -> tuple[int, ...]:
    counts = [0] * BINS
    for value in values:
        counts[min(BINS - 1, int((value - low) / (high - low) * BINS)) if high > low else 0] += 1
    return tuple(counts)


def _correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Pearson's; None of fewer than three pairs, and where one side does not vary."""
    if len(first) < 3 or len(set(first)) < 2 or len(set(second)) < 2:
        return None
    return statistics.correlation(first, second)


def _correlations(names: Sequence[str], scored: Sequence[Scored]) -> dict[tuple[str, str], float]:
    found: dict[tuple[str, str], float] = {}
    for place, first in enumerate(names):
        for second in names[place + 1 :]:
            pairs = [(one.score.rewards.get(first), one.score.rewards.get(second)) for one in scored]
            known = [(a, b) for a, b in pairs if a is not None and b is not None]
            value = _correlation([a for a, _ in known], [b for _, b in known])
            if value is not None:
                found[first, second] = value
    return found


def _disagreements(summaries: Sequence[RewardSummary], scored: Sequence[Scored]) -> list[Disagreement]:
    """Answers by how far two rewards are apart, each in its own standard deviations from its mean."""
    varied = [summary for summary in summaries if summary.std > 0]
    found: list[Disagreement] = []
    for one in scored:
        places = [
            (summary.name, (value - summary.mean) / summary.std)
            for summary in varied
            if (value := one.score.rewards.get(summary.name)) is not None
        ]
        if len(places) > 1:
            low, high = min(places, key=lambda place: place[1]), max(places, key=lambda place: place[1])
            if high[1] - low[1] > 1.0:
                found.append(Disagreement(high[0], low[0], high[1] - low[1], one))
    return sorted(found, key=lambda each: -each.distance)
