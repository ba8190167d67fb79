from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

import pytest
import torch

from groupwise.engines.native.threads import StepThreads


class Machine:
    """A clock that goes on by what a step costs with the present number of threads."""

    def __init__(self, costs: dict[int, float]) -> None:
        self.costs = costs
        self.now = 0.0
        self.used: list[int] = []

    def run(self, threads: StepThreads, steps: int) -> list[int]:
        self.used = []
        for _ in range(steps):
            with threads.step():
                self.used.append(torch.get_num_threads())
                self.now += self.costs[self.used[-1]]
        return self.used


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_it_keeps_all_threads_where_they_help_and_tries_ever_more_rarely() -> None:
    machine = Machine({2: 1.0, 1: 1.5})
    threads = StepThreads(2, clock=lambda: machine.now)
    used = machine.run(threads, 3000)
    assert threads.count == 2
    assert used.count(1) == 3 * 9  # tries after 4, 8, 16 … 1,024 steps
    assert used[-900:].count(1) <= 3


def test_it_goes_to_one_thread_where_that_is_quicker_and_back() -> None:
    machine = Machine({2: 5.0, 1: 1.5})
    threads = StepThreads(2, clock=lambda: machine.now)
    assert machine.run(threads, 30)[10:] == [1] * 13 + [2] * 3 + [1] * 4
    machine.costs = {2: 1.0, 1: 1.5}
    machine.run(threads, 40)
    assert threads.count == 2


def test_a_small_advantage_changes_nothing() -> None:
    machine = Machine({2: 1.0, 1: 0.95})
    threads = StepThreads(2, clock=lambda: machine.now)
    machine.run(threads, 100)
    assert threads.count == 2


def test_the_number_is_as_before_also_after_a_failure() -> None:
    threads = StepThreads(2)
    for _ in range(4):
        with threads.step():
            pass
    with suppress(KeyboardInterrupt), threads.step():
        assert torch.get_num_threads() == 1
        raise KeyboardInterrupt
    assert torch.get_num_threads() == 2
    assert threads.count == 2
