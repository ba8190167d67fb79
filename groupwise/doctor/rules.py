"""What a rule is, and the words that rules share. A new one is a small object here or beside, and a line in `registry`.

A rule has bounds and no memory: it looks at the history, so a resumed run finds what the uninterrupted one finds.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

from groupwise.doctor.history import History


@dataclass(frozen=True, slots=True)
class Seen:
    """What a rule saw in a step.

    Attributes:
        text: one line, with the numbers.
        about: which of several it is about (a reward's name, say); each is a finding of its own.

    Example:
        Seen("reward 'format' gave 0 to every sample of the last 10 steps", about="format")
    """

    text: str
    about: str = ""


class Rule(Protocol):
    """Looks at a run's numbers after each step.

    Attributes:
        name: as in `train.stop_on`.
        reads: names of numbers, see `History`.
        helps: one line, what usually helps.
        told: whether somebody else says it on the terminal.

    Example:
        @dataclass(frozen=True)
        class NoReward:
            name = "no_reward"
            reads = ("reward",)
            helps = "look at the reward function"
            told = False
            def look(self, history):
                return [Seen("every reward is 0")] if history.now("reward") == 0 else []
    """

    name: ClassVar[str]
    reads: ClassVar[tuple[str, ...]]
    helps: ClassVar[str]
    told: ClassVar[bool]

    def look(self, history: History) -> Iterable[Seen]:
        """What is seen now; nothing where all is well, or too little is known."""
        ...


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def rise(values: Sequence[float]) -> tuple[float, float]:
    """How much more the second half has than the first, on average, and the standard error of that."""
    half = len(values) // 2
    before, after = values[:half], values[-half:]
    error = math.sqrt((statistics.variance(before) + statistics.variance(after)) / half)
    return mean(after) - mean(before), error
