"""Runs side by side: sorted, in columns, with the settings in which they differ."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from groupwise.config.values import literal
from groupwise.runs.reading import RunRecord

_NOT_COMPARED = ("train.output", "tracking.")
"""Where a run is, and who is told of it, is no difference."""

SORTED_BY: Mapping[str, Callable[[RunRecord], Any]] = {
    "name": lambda run: str(run.path),
    "state": lambda run: run.state,
    "steps": lambda run: run.steps,
    "accuracy": lambda run: run.accuracy,
    "best": lambda run: run.best,
    "reward": lambda run: run.reward,
    "seconds": lambda run: run.seconds,
    "findings": lambda run: run.findings,
}


def sort_runs(runs: Sequence[RunRecord], by: str) -> list[RunRecord]:
    """By name or state from the first, by a number from the largest; what has none comes last."""
    value = SORTED_BY[by]
    if by in ("name", "state"):
        return sorted(runs, key=lambda run: (value(run), str(run.path)))
    known = [run for run in runs if value(run) is not None]
    return sorted(known, key=lambda run: -value(run)) + [run for run in runs if value(run) is None]


def differing(runs: Sequence[RunRecord]) -> list[str]:
    """The settings that are not the same in all runs that can be read."""
    readable = [run.settings for run in runs if run.state != "unreadable"]
    names = sorted({name for settings in readable for name in settings})
    return [
        name
        for name in names
        if not name.startswith(_NOT_COMPARED) and len({literal(settings.get(name)) for settings in readable}) > 1
    ]


def table(runs: Sequence[RunRecord], *, root: Path, width: int) -> list[str]:
    """Lines of at most `width` characters: a head, and one for each run; differences take what room is left."""
    names = differing(runs)
    head = ("run", "state", "steps", "accuracy", "best", "reward", "seconds", "found")
    rows = [head, *(_cells(run, root) for run in runs)]
    sizes = [max(len(row[column]) for row in rows) for column in range(len(head))]
    sizes[0] = min(sizes[0], max(12, width - sum(sizes[1:]) - 2 * len(sizes) - 12))
    lines: list[str] = []
    for run, row in zip((None, *runs), rows, strict=True):
        cells = [_fitted(row[0], sizes[0])]
        cells += [
            cell.ljust(size) if column == 1 else cell.rjust(size)
            for column, (cell, size) in enumerate(zip(row[1:], sizes[1:], strict=True), 1)
        ]
        last = "differs in" if run is None else _differences(run, names)
        lines.append("  ".join([*cells, last])[:width].rstrip())
    return lines


def _cells(run: RunRecord, root: Path) -> tuple[str, ...]:
    if run.state == "unreadable":
        return (_place(run.path, root), run.state, "", "", "", "", "", "")
    steps = f"{run.steps}" if run.of_steps is None else f"{run.steps}/{run.of_steps}"
    return (
        _place(run.path, root),
        run.state,
        steps,
        _percent(run.accuracy),
        _percent(run.best),
        "" if run.reward is None else f"{run.reward:.3f}",
        "" if run.seconds is None else f"{run.seconds:.0f}",
        str(run.findings or ""),
    )


def _place(path: Path, root: Path) -> str:
    shown = os.path.relpath(path, root)
    return path.name if shown == "." else shown


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


def _fitted(text: str, size: int) -> str:
    return text.ljust(size) if len(text) <= size else "…" + text[-(size - 1) :]


def _differences(run: RunRecord, names: Sequence[str]) -> str:
    if run.problem:
        return run.problem
    return "  ".join(f"{name} = {literal(run.settings[name])}" for name in names if name in run.settings)
