"""A program's watcher, kept from changing what it does not own."""

from __future__ import annotations

from collections.abc import Mapping

from groupwise.process_state import guarded
from groupwise.types import Watcher, Wish

_WHO = "a callback"


class GuardedWatcher:
    """Passes everything on, with copies of the run's numbers; what belongs to the process is set back after each call.

    It runs in the thread that trains, so torch's and numpy's state there is kept as well.
    """

    def __init__(self, watcher: Watcher) -> None:
        self._watcher = watcher

    def begins(self, step: int, num_steps: int) -> None:
        with guarded(_WHO, this_thread=True):
            self._watcher.begins(step, num_steps)

    def updated(self, step: int) -> bool:
        with guarded(_WHO, this_thread=True):
            return self._watcher.updated(step)

    def logged(self, step: int, metrics: Mapping[str, float]) -> Wish:
        with guarded(_WHO, this_thread=True):
            return self._watcher.logged(step, dict(metrics))

    def saved(self, step: int) -> None:
        with guarded(_WHO, this_thread=True):
            self._watcher.saved(step)
