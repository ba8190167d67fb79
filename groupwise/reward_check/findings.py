"""What is wrong with a reward, as far as its numbers say; each finding is one sentence with what usually helps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from groupwise.reward_check.checking import RewardCheck, RewardSummary

_SATURATED = 0.95
_EQUAL = 0.7
_BY_LENGTH = 0.8
_ALIKE = 0.95
_SLOW_SECONDS = 1.0
_FEW = 8  # answers, below which shares say little


@dataclass(frozen=True, slots=True)
class Finding:
    """What one rule found, about one reward or pair.

    Example:
        Finding("constant", "length", "gives 0 to all 256 answers, so it teaches nothing; …")
    """

    rule: str
    reward: str
    text: str


def findings_of(check: RewardCheck) -> list[Finding]:
    """All of them, reward by reward."""
    found = [
        Finding(rule, summary.name, text)
        for summary in check.rewards
        for rule, look in (_OF_RIGHT if check.answers.are_right else RULES).items()
        for text in look(summary)
    ]
    for (first, second), value in check.correlations.items():
        if abs(value) >= _ALIKE and len(check.scored) >= _FEW:
            text = f"goes with {second} ({value:+.2f}): two rewards that say the same count double; leave one out"
            found.append(Finding(_PAIRS, first, text))
    return found


def _failed(one: RewardSummary) -> Iterator[str]:
    if one.failed:
        cause, count = one.causes[0]
        yield f"failed on {one.failed} answers, most often ({count}): {cause}; mend the function, or see its on_error"


def _silent(one: RewardSummary) -> Iterator[str]:
    if not one.count and not one.failed:
        yield "gave no value to any answer; look at its data_source and at the columns that it reads"


def _constant(one: RewardSummary) -> Iterator[str]:
    if one.count >= _FEW and one.low == one.high:
        yield f"gives {one.low:g} to all {one.count} answers, so it teaches nothing; look at what it compares"


def _saturated(one: RewardSummary) -> Iterator[str]:
    if one.count >= _FEW and one.low < one.high and one.at_high >= _SATURATED:
        yield f"gives its highest value to {one.at_high:.0%} of the answers: little is left to learn from it"


def _rejects(one: RewardSummary) -> Iterator[str]:
    if one.count and one.low < one.high:
        missed = one.count - round(one.at_high * one.count)
        yield f"gives less than its highest, {one.high:g}, to {missed} of the data's own {one.count} answers"
    elif one.count and one.high <= 0:
        yield f"gives {one.high:g} to every one of the data's own answers; look at what it compares"


def _equal(one: RewardSummary) -> Iterator[str]:
    if one.equal_groups is not None and one.low < one.high and one.equal_groups >= _EQUAL:
        yield (
            f"tells no answer from another in {one.equal_groups:.0%} of the groups, which teach nothing then; "
            "use harder or easier prompts, partial credit, or rollout.dynamic_sampling_cap"
        )


def _by_length(one: RewardSummary) -> Iterator[str]:
    if one.count >= _FEW and one.with_length is not None and abs(one.with_length) >= _BY_LENGTH:
        kind = "longer" if one.with_length > 0 else "shorter"
        yield f"goes with length alone ({one.with_length:+.2f}): a policy learns to write {kind} answers"


def _pays(kind: str, what: str, *, right: bool = False) -> Callable[[RewardSummary], Iterator[str]]:
    """Where a probe earns what answers do; a reward that pays all the same is `constant`, unless all are `right`."""

    def look(one: RewardSummary) -> Iterator[str]:
        paid = one.paid.get(kind)
        if paid is not None and one.count and paid >= one.mean and (right or paid > one.low):
            yield f"gives {what} {paid:.3g}, and answers {one.mean:.3g} on average: a policy will find that out"

    return look


def _slow(one: RewardSummary) -> Iterator[str]:
    if one.seconds > _SLOW_SECONDS:
        yield f"takes {one.seconds:.1f} s an answer; a step waits for the slowest of its groups"


_PAIRS = "alike"
_PROBES = {"empty": "an empty answer", "echo": "the question written once more", "half": "half of an answer"}
RULES: Mapping[str, Callable[[RewardSummary], Iterator[str]]] = {
    "failed": _failed,
    "silent": _silent,
    "constant": _constant,
    "saturated": _saturated,
    "equal_groups": _equal,
    "length": _by_length,
    **{f"pays_{kind}": _pays(kind, what) for kind, what in _PROBES.items()},
    "slow": _slow,
}
_OF_RIGHT = {
    "failed": _failed,
    "silent": _silent,
    "rejects": _rejects,
    **{f"pays_{kind}": _pays(kind, what, right=True) for kind, what in _PROBES.items()},
    "slow": _slow,
}
"""For answers that are right: that they all earn the same is as it should be."""
NAMES = (*RULES, "rejects", _PAIRS)
