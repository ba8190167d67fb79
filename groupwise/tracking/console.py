"""The terminal: one line per step, and below it a live progress bar where there is a terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TimeRemainingColumn

from groupwise.texts import one_line
from groupwise.tracking.base import Sample
from groupwise.tracking.cards import cards
from groupwise.tracking.line import step_line

_NARROW = 60  # columns below which the bar is short


class ConsoleTracker:
    """Shows the key metrics of each step. On a terminal a line has as many of them as fit; a pipe or file gets all.

    Args:
        title: named once at the start.
        total_steps: of the whole run; the bar and the `step 3/100` count against it.
        resumed_step: steps that were done before this start; None in a new run.
        accuracy_of: the reward that `eval/accuracy` counts.
        lines_every: seconds between two lines, beside the first and the last; 0 has one for each step.
        file: where to write; None is standard error, so that standard output stays for results.
    """

    def __init__(
        self,
        *,
        title: str,
        total_steps: int | None = None,
        resumed_step: int | None = None,
        accuracy_of: str = "",
        lines_every: float = 0.0,
        file: IO[str] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._title = title
        self._total = total_steps
        self._resumed_step = resumed_step
        self._accuracy_of = one_line(accuracy_of, limit=40)
        self._lines_every = lines_every
        self._clock = clock
        self._shown_at: float | None = None
        self._waiting: tuple[int, Mapping[str, float]] | None = None
        self._console = Console(file=file, stderr=file is None, highlight=False, markup=False, soft_wrap=True)
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def start(self, config: Mapping[str, Any], run_dir: Path) -> None:
        resumed = f", resumed after step {self._resumed_step}" if self._resumed_step is not None else ""
        self._console.print(one_line(f"{self._title}: {run_dir}{resumed}", limit=1_000))
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            bar = BarColumn(bar_width=20 if self._console.width >= _NARROW else 10)
            self._progress = Progress(bar, MofNCompleteColumn(), TimeRemainingColumn(), console=self._console)
            self._task = self._progress.add_task("", total=self._total, completed=self._resumed_step or 0)
            self._progress.start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=step)
        now = self._clock()
        if self._shown_at is None or step == self._total or now - self._shown_at >= self._lines_every:
            self._show(step, metrics)
            self._shown_at = now
        else:
            self._waiting = (step, metrics)

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        for line in cards(step, samples, self._console):
            self._console.print(line)

    def close(self) -> None:
        if self._waiting is not None:  # the last, of a run that ended before its time
            self._show(*self._waiting)
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _show(self, step: int, metrics: Mapping[str, float]) -> None:
        width = self._console.width if self._console.is_terminal else None
        head = f"step {step}/{self._total}" if self._total else f"step {step}"
        self._console.print(step_line(head, metrics, accuracy_of=self._accuracy_of, width=width))
        self._waiting = None
