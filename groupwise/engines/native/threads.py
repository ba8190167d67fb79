"""How many threads a decode step of a small model gets: all of torch's, or one, whichever is found to be quicker.

Threads that share small products wait for each other thousands of times a second; beside another busy process, each
wait lasts as long as that process's turn. Measured with 5.8 million parameters on two cores: with two threads 3,000
tokens/s alone and 790 beside one busy process, with one thread 2,200 in both cases. The number changes no bit.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager

import torch

SMALL_BYTES = 1 << 28  # weights of a model whose steps are short enough to try
_TRIES = 3  # steps that are compared
_FIRST, _AGAIN, _LAST = 4, 16, 1024  # steps before a try: the first one, one after a change, and at most


class StepThreads:
    """Times steps, and now and then tries the other number; the longer it is found worse, the more rarely.

    Args:
        most: torch's number of threads.
        clock: seconds.
    """

    def __init__(self, most: int, *, clock: Callable[[], float] = time.perf_counter) -> None:
        self.most = most
        self.count = most
        self._clock = clock
        self._wait = _FIRST
        self._left = _FIRST
        self._seconds: list[float] = []
        self._tried: list[float] = []

    @contextmanager
    def step(self) -> Generator[None, None, None]:
        """One step runs inside; torch's number of threads is as before afterwards."""
        trying = self._left <= 0
        torch.set_num_threads(self._other if trying else self.count)
        started = self._clock()
        try:
            yield
        finally:
            torch.set_num_threads(self.most)
        self._note(self._clock() - started, trying)

    @property
    def _other(self) -> int:
        return 1 if self.count == self.most else self.most

    def _note(self, seconds: float, trying: bool) -> None:
        if not trying:
            self._seconds = [*self._seconds[1 - _TRIES :], seconds]
            self._left -= 1
            return
        self._tried.append(seconds)
        if len(self._tried) < _TRIES:
            return
        if statistics.median(self._tried) < 0.9 * statistics.median(self._seconds):
            self.count, self._wait = self._other, _AGAIN
            self._seconds = self._tried
        else:
            self._wait = min(2 * self._wait, _LAST)
        self._left, self._tried = self._wait, []
