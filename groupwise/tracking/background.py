"""A tracker in a thread of its own, so that a slow or stuck one costs training nothing."""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeAlias

from groupwise.tracking.base import Sample, Tracker

logger = logging.getLogger("groupwise.tracking")

CLOSE_SECONDS = 15.0
_Call: TypeAlias = Callable[[], None]


class Background:
    """Queues the calls for `tracker` and returns at once; what the tracker raises is raised by the next call here.

    Args:
        capacity: most waiting calls; what does not fit is dropped, with one warning.
        close_seconds: how long `close` waits at most for the calls that are still waiting, from `stop` on;
            None is `CLOSE_SECONDS`.
    """

    def __init__(
        self, name: str, tracker: Tracker, *, capacity: int = 1000, close_seconds: float | None = None
    ) -> None:
        self._name = name
        self._tracker = tracker
        self._calls: queue.Queue[_Call | None] = queue.Queue(capacity)
        self._close_seconds = CLOSE_SECONDS if close_seconds is None else close_seconds
        self._deadline = math.inf
        self._failure: Exception | None = None
        self._warned = False
        # A daemon: a tracker that hangs must not keep the process from ending.
        self._thread = threading.Thread(target=self._work, name=f"groupwise-{name}", daemon=True)

    def start(self, config: Mapping[str, Any], run_dir: Path) -> None:
        self._put(lambda: self._tracker.start(config, run_dir))
        self._thread.start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._put(lambda: self._tracker.log(step, metrics))

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        self._put(lambda: self._tracker.samples(step, samples))

    def stop(self) -> None:
        """Let the tracker end; `close` waits for it. Several that are stopped first are waited for together."""
        self._deadline = min(self._deadline, time.monotonic() + self._close_seconds)
        with suppress(queue.Full):  # then close() finds room
            self._calls.put_nowait(None)

    def close(self) -> None:
        """Write what waits, until `close_seconds` after `stop`.

        Raises:
            TimeoutError: the tracker was not done by then.
        """
        self.stop()
        if self._thread.is_alive():
            with suppress(queue.Full):
                self._calls.put(None, timeout=self._left())
            self._thread.join(self._left())
        if self._thread.is_alive():
            raise TimeoutError(
                f"not done {self._close_seconds:g} s after the end of training; the run's own files have everything"
            )
        self._raise_failure()

    def _left(self) -> float:
        return max(0.0, self._deadline - time.monotonic())

    def _put(self, call: _Call) -> None:
        self._raise_failure()
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            if not self._warned:
                logger.warning(
                    "the %s tracker is %d calls behind; what it cannot take is left out of it (not of the run's files)",
                    self._name,
                    self._calls.maxsize,
                )
            self._warned = True

    def _raise_failure(self) -> None:
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def _work(self) -> None:
        try:
            while (call := self._calls.get()) is not None:
                call()
            self._tracker.close()
        except Exception as error:  # noqa: BLE001 - third-party trackers raise anything; the next call raises it
            self._close_quietly()
            self._failure = error

    def _close_quietly(self) -> None:
        try:
            self._tracker.close()
        except Exception as error:  # noqa: BLE001 - it failed already
            logger.debug("closing %s failed too: %s", self._name, error)
