"""The terminal: a live progress bar where there is one, else one plain line per step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from groupwise.texts import one_line
from groupwise.tracking.base import Sample, SampleTable

LONGEST_TEXT = 400  # characters of a prompt or completion in a table


@dataclass(frozen=True, slots=True)
class Column:
    """A metric that is shown: its name, its label, and a format for its value."""

    metric: str
    label: str
    format: str


COLUMNS = (
    Column("reward", "reward", "{:.3f}"),
    Column("eval/accuracy", "accuracy", "{:.1%}"),
    Column("loss", "loss", "{:.4f}"),
    Column("kl", "kl", "{:.4f}"),
    Column("completions/mean_length", "length", "{:.0f}"),
    Column("throughput/tokens_per_second", "tok/s", "{:.0f}"),
    Column("time/step", "seconds", "{:.1f}"),
)


def summary(metrics: Mapping[str, float], *, accuracy_of: str = "") -> str:
    """The shown metrics that are there, as `reward 0.512  loss 0.0123  …`; a value that is no number shows as `nan`.

    Args:
        accuracy_of: the reward that is counted, to stand before its label.
    """
    named = {"eval/accuracy": f"{accuracy_of} accuracy"} if accuracy_of else {}
    cells = (
        f"{named.get(column.metric, column.label)} {column.format.format(value) if math.isfinite(value) else value}"
        for column in COLUMNS
        if (value := metrics.get(column.metric)) is not None
    )
    return "  ".join(cells)


def _cell(value: str | float | None) -> Text:
    """Text that is no markup, cut where a table would become unreadable. `SampleTable` has cleaned it."""
    if isinstance(value, str):
        return Text(value if len(value) <= LONGEST_TEXT else value[:LONGEST_TEXT] + " …")
    return Text("" if value is None else f"{value:.3g}")


class ConsoleTracker:
    """Shows the key metrics of each step.

    Args:
        title: named once at the start.
        total_steps: of the whole run; the bar and the `step 3/100` count against it.
        resumed_step: steps that were done before this start; None in a new run.
        accuracy_of: the reward that `eval/accuracy` counts.
        file: where to write; None is standard error, so that standard output stays for results.
    """

    def __init__(
        self,
        *,
        title: str,
        total_steps: int | None = None,
        resumed_step: int | None = None,
        accuracy_of: str = "",
        file: IO[str] | None = None,
    ) -> None:
        self._title = title
        self._total = total_steps
        self._resumed_step = resumed_step
        self._accuracy_of = one_line(accuracy_of, limit=40)
        self._console = Console(file=file, stderr=file is None, highlight=False, markup=False, soft_wrap=True)
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def start(self, config: Mapping[str, Any], run_dir: Path) -> None:
        resumed = f", resumed after step {self._resumed_step}" if self._resumed_step is not None else ""
        self._console.print(one_line(f"{self._title}: {run_dir}{resumed}", limit=1_000))
        if self._console.is_terminal:
            columns = (
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[line]}"),
            )
            self._progress = Progress(*columns, console=self._console)
            self._task = self._progress.add_task("", total=self._total, completed=self._resumed_step or 0, line="")
            self._progress.start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        line = summary(metrics, accuracy_of=self._accuracy_of)
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=step, line=line)
        else:
            self._console.print(f"step {step}" + (f"/{self._total}" if self._total else "") + f"  {line}")

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        found = SampleTable.of(step, samples)
        table = Table(*found.columns[1:], title=f"samples of step {step}", show_lines=True)
        for row in found.rows:
            table.add_row(*(_cell(value) for value in row[1:]))
        self._console.print(table, soft_wrap=False)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
