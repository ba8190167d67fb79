"""Which evaluation was the best so far, so that its checkpoint can be kept."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from groupwise import metrics
from groupwise.metrics import Metrics


class Best:
    """The highest value of a metric so far, and the step that had it; of equal ones the earlier.

    Args:
        metric: the name of an evaluation's metric; None finds nothing.

    Attributes:
        step: None before the first. Step 0 never counts: what training begins with is no checkpoint.

    Example:
        best = Best("eval/accuracy")
        best.judge(20, {"eval/accuracy": Last(0.5)})  # True
        best.judge(40, {"eval/accuracy": Last(0.5)})  # False
    """

    def __init__(self, metric: str | None) -> None:
        self._metric = metric
        self._value = -math.inf
        self.step: int | None = None

    def judge(self, step: int, scores: Metrics) -> bool:
        """Whether the evaluation after `step` is better than all before."""
        if step == 0 or self._metric is None or self._metric not in scores:
            return False
        value = metrics.resolve(scores)[self._metric]
        if not value > self._value:  # so that NaN is never better
            return False
        self._value, self.step = value, step
        return True

    def state_dict(self) -> dict[str, Any]:
        return {} if self.step is None else {"metric": self._metric, "step": self.step, "value": self._value}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Of another metric nothing is taken."""
        if state and state["metric"] == self._metric:
            self.step, self._value = int(state["step"]), float(state["value"])
