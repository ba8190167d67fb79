"""A program that follows its run: what it is told and may ask for, kept from changing what it does not own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from groupwise.process_state import guarded

_WHO = "a callback"


@dataclass(frozen=True, slots=True)
class Wish:
    """What a watcher asks for after a step.

    Attributes:
        save: a checkpoint of it, whatever `train.save_every` says.
        stop: it is the run's last step.

    Example:
        Wish(stop=True)
    """

    save: bool = False
    stop: bool = False


class Watcher(Protocol):
    """A program that follows its run; steps count from 1. Whatever it raises ends the run."""

    def begins(self, step: int, num_steps: int) -> None:
        """Before each step, which is one of `num_steps`."""
        ...

    def updated(self, step: int) -> bool:
        """After each step's updates. True asks for an evaluation, whatever `eval.every` says."""
        ...

    def logged(self, step: int, metrics: Mapping[str, float]) -> Wish:
        """After each step, its numbers; after step 0, those of an evaluation before training."""
        ...

    def saved(self, step: int) -> None:
        """The checkpoint of this step is complete."""
        ...


class Unwatched:
    """The `Watcher` of a run that nobody follows."""

    def begins(self, step: int, num_steps: int) -> None: ...

    def updated(self, step: int) -> bool:
        return False

    def logged(self, step: int, metrics: Mapping[str, float]) -> Wish:
        return Wish()

    def saved(self, step: int) -> None: ...


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
