"""Steps without one usable sample: said at once, and the end of a run that has too many of them."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from groupwise.errors import TrainingError
from groupwise.metrics import Last, Metrics
from groupwise.texts import one_line

logger = logging.getLogger(__name__)

LONGEST_CAUSE = 500  # characters
_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True, slots=True)
class Usable:
    """How much of a step could be learned from.

    Attributes:
        count: samples with a reward of their own and tokens that count; in supervised training, learned tokens.
        causes: why each of the others is not usable.

    Example:
        Usable(count=0, causes=("reward 'mine' failed: KeyError: 'answer'",) * 16)
    """

    count: int
    causes: Sequence[str] = ()


def commonest(causes: Sequence[str]) -> str:
    """The cause that came most often, with its count; causes that differ in numbers alone are one."""
    alike = Counter(_NUMBER.sub("#", cause) for cause in causes)
    if not alike:
        return "nothing was sampled"
    [(kind, times)] = alike.most_common(1)
    example = next(cause for cause in causes if _NUMBER.sub("#", cause) == kind)
    return f"{one_line(example, limit=LONGEST_CAUSE)} ({times:,} of {len(causes):,})"


class EmptySteps:
    """Judges every step. Rewards that are all equal teach nothing either, but are no failure: they count as usable.

    A run of which not one step had a usable sample fails at its end too, however short it is.

    Args:
        limit: steps in a row after which the run ends; 0 lets it go on, always.
        remedy: what to do about it.

    Example:
        empty = EmptySteps(3, remedy="mend the reward")
        metrics = empty.after(step, Usable(count=16))
        empty.check(step, last=False)
    """

    def __init__(self, limit: int, *, remedy: str) -> None:
        self._limit = limit
        self._remedy = remedy
        self._in_a_row = 0
        self._any_usable = False
        self._newest = ""

    def after(self, step: int, usable: Usable) -> Metrics:
        """Take note of `step` (from 1), and say so when it had nothing; how many in a row had nothing."""
        if usable.count:
            self._in_a_row, self._any_usable = 0, True
        else:
            self._in_a_row += 1
            self._newest = commonest(usable.causes)
            logger.warning("step %d has not one usable sample, and teaches nothing: %s", step, self._newest)
        return {"empty_steps": Last(float(self._in_a_row))}

    def check(self, step: int, *, last: bool) -> None:
        """Called when everything of `step` is written.

        Raises:
            TrainingError: it was one too many, or the last step of a run that never had a usable sample.
        """
        if not self._limit or not self._in_a_row:
            return
        if self._in_a_row >= self._limit:
            what = f"{self._in_a_row} steps in a row, the last of them step {step}, had not one usable sample"
            limit = f"train.stop_after_empty_steps = {self._limit}"
        elif last and not self._any_usable:
            what = f"none of the run's {step} step{'s' * (step > 1)} had one usable sample, so it learned nothing"
            limit = "train.stop_after_empty_steps = 0 would let it pass"
        else:
            return
        raise TrainingError(f"{what} ({limit}). Most frequent cause: {self._newest}. {self._remedy}")

    def state_dict(self) -> dict[str, Any]:
        return {"in_a_row": self._in_a_row, "any_usable": self._any_usable, "newest": self._newest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._in_a_row, self._any_usable = int(state["in_a_row"]), bool(state["any_usable"])
        self._newest = str(state["newest"])
