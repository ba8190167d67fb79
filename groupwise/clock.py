"""Where a step's seconds go."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from groupwise.metrics import Metric, Sum


class Clock:
    """Times the phases of one step.

    Example:
        clock = Clock()
        with clock("rollout"):
            groups = await buffer.take()
        clock.metrics()     # time/rollout, and time/step since the clock was made
    """

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._phases: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self._phases[phase] = self._phases.get(phase, 0.0) + time.perf_counter() - start

    @property
    def elapsed(self) -> float:
        return time.perf_counter() - self._start

    def metrics(self) -> dict[str, Metric]:
        phases: dict[str, Metric] = {f"time/{name}": Sum(seconds) for name, seconds in self._phases.items()}
        return phases | {"time/step": Sum(self.elapsed)}
