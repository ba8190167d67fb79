"""When a run saves, and what: the cadence of checkpoints, in one object for every loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from groupwise.checkpoint.store import save_checkpoint
from groupwise.config.train import TrainConfig
from groupwise.protocols import Stateful

_PRICE = 0.05


class RunRecord(Protocol):
    """The part of a checkpoint that says which run it is of, as `groupwise.resume.Identity`."""

    def at(self, step: int) -> Stateful: ...


@dataclass(slots=True)
class Saver:
    """Saves every `train.save_every` steps, and by the clock: after the run's first step and then every
    `train.save_every_minutes`, less often where a save is slow, so that these take at most a twentieth of the time.
    The clock decides when, never what: a resumed run comes to the same weights from any checkpoint.

    Attributes:
        record: saved beside the parts, as `run`.
        confirm: called before each save; raises where this process may not write any more.
        saved: called with each step that was saved.
        best: the step of the best evaluation; its checkpoint is saved at once, and kept.

    Example:
        saver = Saver(run.checkpoints, parts, config.train, record=identity)
        saver.after(step)                      # where it is due
        saver.after(step, now=True)            # the last step, or one that somebody asked for
    """

    root: Path
    parts: Mapping[str, Stateful]
    config: TrainConfig
    _: KW_ONLY
    record: RunRecord
    confirm: Callable[[], None] = lambda: None
    saved: Callable[[int], Any] = lambda step: None
    best: Callable[[], int | None] = lambda: None
    clock: Callable[[], float] = time.monotonic
    _last: float = field(init=False)
    _seconds: float = 0.0

    def __post_init__(self) -> None:
        self._last = self.clock()

    def after(self, step: int, *, now: bool = False) -> None:
        """Save this step where that is due, or asked for.

        Raises:
            CheckpointError: the checkpoint cannot be written; older ones are untouched.
        """
        if now or self._is_due(step):
            self.save(step)
            self.saved(step)

    def save(self, step: int) -> None:
        """Save now, without telling anybody."""
        self.confirm()
        began = self.clock()
        parts = {**self.parts, "run": self.record.at(step)}
        save_checkpoint(self.root, step, parts, keep=self.config.keep_checkpoints, best=self.best())
        self._last = self.clock()
        self._seconds = self._last - began

    def _is_due(self, step: int) -> bool:
        every, minutes = self.config.save_every, self.config.save_every_minutes
        if (every and step % every == 0) or self.best() == step:
            return True
        if not minutes:
            return False
        return step == 1 or self.clock() - self._last >= max(60 * minutes, self._seconds * (1 / _PRICE - 1))
