"""The clock: phases add up, also when one raises."""

from __future__ import annotations

import time

import pytest

from groupwise.clock import Clock
from groupwise.metrics import merge, resolve


def test_a_phase_entered_twice_adds_up() -> None:
    clock = Clock()
    for _ in range(2):
        with clock("train"):
            time.sleep(0.02)
    found = resolve(clock.metrics())
    assert list(found) == ["time/train", "time/step"]
    assert 0.04 <= found["time/train"] <= found["time/step"]


def test_a_phase_that_raises_is_timed() -> None:
    clock = Clock()

    def fail() -> None:
        with clock("rollout"):
            time.sleep(0.01)
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        fail()
    assert resolve(clock.metrics())["time/rollout"] >= 0.01


def test_phases_may_nest() -> None:
    clock = Clock()
    with clock("outer"), clock("inner"):
        time.sleep(0.01)
    found = resolve(clock.metrics())
    assert found["time/outer"] >= found["time/inner"] >= 0.01


def test_elapsed_grows() -> None:
    clock = Clock()
    first = clock.elapsed
    assert 0 <= first <= clock.elapsed


def test_times_of_several_clocks_merge_to_their_sum() -> None:
    clocks = [Clock(), Clock()]
    for clock in clocks:
        with clock("eval"):
            time.sleep(0.01)
    assert resolve(merge(*(clock.metrics() for clock in clocks)))["time/eval"] >= 0.02
