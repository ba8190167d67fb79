"""Which evaluation was the best."""

from __future__ import annotations

import math

from groupwise.evaluation.best import Best
from groupwise.metrics import Last


def judged(best: Best, values: dict[int, float], metric: str = "eval/accuracy") -> list[int]:
    return [step for step, value in values.items() if best.judge(step, {metric: Last(value), "eval/failed": Last(9.0)})]


def test_higher_is_better_and_the_earlier_of_equal_ones() -> None:
    best = Best("eval/accuracy")
    assert judged(best, {0: 0.9, 10: 0.2, 20: math.nan, 30: 0.2, 40: 0.5, 50: 0.5, 60: 0.4}) == [10, 40]
    assert best.step == 40, "step 0 is no checkpoint, and NaN is no best"


def test_no_metric_and_an_absent_one_find_nothing() -> None:
    assert judged(Best(None), {1: 1.0}) == []
    assert judged(Best("eval/reward"), {1: 1.0}) == []


def test_the_state_goes_on_and_is_of_its_metric_alone() -> None:
    best = Best("eval/accuracy")
    judged(best, {10: 0.7, 20: 0.1})
    resumed, other = Best("eval/accuracy"), Best("eval/reward")
    resumed.load_state_dict(best.state_dict())
    other.load_state_dict(best.state_dict())
    assert (resumed.step, other.step) == (10, None)
    assert judged(resumed, {30: 0.7, 40: 0.8}) == [40]
    assert Best("eval/accuracy").state_dict() == {}
