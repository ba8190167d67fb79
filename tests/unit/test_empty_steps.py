"""What is counted over steps, and when a run ends by it."""

from __future__ import annotations

import json
import logging

import pytest

from groupwise.empty_steps import EmptySteps, Usable, commonest
from groupwise.errors import TrainingError
from groupwise.metrics import resolve

FAILED = Usable(0, ["reward 'a' failed: KeyError: 'answer'"] * 5 + ["cut off"] * 3)
GOOD = Usable(1, ["cut off"] * 7)


def test_it_ends_after_so_many_in_a_row_and_says_why(caplog: pytest.LogCaptureFixture) -> None:
    empty = EmptySteps(3, remedy="Mend it")
    for step, (usable, in_a_row) in enumerate(
        [(FAILED, 1), (FAILED, 2), (GOOD, 0), (FAILED, 1), (FAILED, 2), (FAILED, 3)], start=1
    ):
        assert resolve(empty.after(step, usable)) == {"empty_steps": in_a_row}
        if in_a_row < 3:
            empty.check(step, last=False)
    with pytest.raises(TrainingError) as error:
        empty.check(6, last=False)
    assert str(error.value) == (
        "3 steps in a row, the last of them step 6, had not one usable sample (train.stop_after_empty_steps = 3). "
        "Most frequent cause: reward 'a' failed: KeyError: 'answer' (5 of 8). Mend it"
    )
    assert error.value.exit_code == 1
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert [int(text.split()[1]) for text in told] == [1, 2, 4, 5, 6]
    assert all("KeyError: 'answer' (5 of 8)" in text for text in told)


def test_a_run_that_never_had_any_fails_at_its_end() -> None:
    empty = EmptySteps(3, remedy="Mend it")
    empty.after(1, FAILED)
    empty.check(1, last=False)
    empty.after(2, FAILED)
    with pytest.raises(TrainingError, match="none of the run's 2 steps had one usable sample"):
        empty.check(2, last=True)


def test_a_run_that_learned_something_may_end_with_an_empty_step() -> None:
    empty = EmptySteps(3, remedy="")
    empty.after(1, GOOD)
    empty.after(2, FAILED)
    empty.check(2, last=True)


def test_zero_lets_everything_pass(caplog: pytest.LogCaptureFixture) -> None:
    empty = EmptySteps(0, remedy="")
    for step in range(1, 50):
        empty.after(step, FAILED)
        empty.check(step, last=step == 49)
    assert len(caplog.records) == 49


def test_a_resumed_run_counts_on() -> None:
    first, second = EmptySteps(3, remedy=""), EmptySteps(3, remedy="")
    first.after(1, FAILED)
    first.after(2, FAILED)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    second.after(3, FAILED)
    with pytest.raises(TrainingError, match="3 steps in a row"):
        second.check(3, last=False)
    first.after(3, GOOD)
    second.load_state_dict(first.state_dict())
    second.after(4, FAILED)
    second.check(4, last=True)


def test_causes_that_differ_in_numbers_are_one() -> None:
    causes = [f"no file answer-{k}.txt" for k in range(5)] + ["timeout"] * 4
    assert commonest(causes) == "no file answer-0.txt (5 of 9)"
    assert commonest([]) == "nothing was sampled"
    assert len(commonest(["\x1b[2J" + "x" * 10_000_000])) < 600
