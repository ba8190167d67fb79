"""Which reward accuracy counts: the first that gives a value."""

from __future__ import annotations

from collections.abc import Iterable

from groupwise.rewards import RewardScorer


def counted_rewards(scorer: RewardScorer, sources: Iterable[str]) -> str:
    """The names of the first rewards for rows of these data sources, as `gsm8k, exact_match`."""
    firsts = (next(iter(scorer.weights_of(source)), "") for source in sources)
    return ", ".join(dict.fromkeys(name for name in firsts if name))


def counted_remarks(scorer: RewardScorer, sources: Iterable[str]) -> list[str]:
    """A sentence for each first reward that is not the heaviest one."""
    remarks: list[str] = []
    for source in dict.fromkeys(sources):
        weights = scorer.weights_of(source)
        heaviest = max(weights, key=lambda name: abs(weights[name]), default="")
        first = next(iter(weights), "")
        if first and abs(weights[first]) < abs(weights[heaviest]):
            remarks.append(
                f"accuracy counts the first reward, {first!r} (weight {weights[first]:g}), and {heaviest!r} weighs "
                f"more ({weights[heaviest]:g}); name {heaviest!r} first to count that"
            )
    return list(dict.fromkeys(remarks))
