"""What a run directory says of its run, whatever state it is in and whatever version wrote it."""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from groupwise.config.model_name import is_run

State: TypeAlias = Literal["running", "finished", "stopped", "killed", "unreadable"]
"""`stopped` ended and said so, without a summary: by Ctrl-C, an error or a rule of `train.stop_on`."""

_LOCK = re.compile(r"\.lock\.(\d+)")
_SILENT_SECONDS = 60.0
"""A run that goes on touches its lock every twenty seconds."""

_HIDES_RUNS = ("checkpoints", "trajectories", "final", "base", "weights", "engines", "tensorboard", "bundles")


@dataclass(frozen=True, slots=True)
class RunRecord:
    """One run.

    Attributes:
        steps: done so far; `of_steps` are those it is to have, where the config says.
        accuracy: of its last evaluation; `best` of all, `first` of the first.
        reward: of its last step.
        seconds: of training, as far as its files tell.
        findings: of the doctor.
        settings: of its config, by dotted name.
        problem: why it is unreadable.
    """

    path: Path
    state: State
    steps: int = 0
    of_steps: int | None = None
    first: float | None = None
    best: float | None = None
    accuracy: float | None = None
    reward: float | None = None
    seconds: float | None = None
    findings: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    problem: str = ""


def find_runs(root: Path) -> Iterator[Path]:
    """All run directories at and below `root`, by name; what is inside one is not looked at."""
    for folder, folders, files in os.walk(root, followlinks=False):
        place = Path(folder)
        if "config.json" in files and _looks_like_a_run(place):
            folders.clear()
            yield place
            continue
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in _HIDES_RUNS)


def _looks_like_a_run(place: Path) -> bool:
    """A torn config is a run all the same, where a run's other files are beside it."""
    return is_run(place) or (place / "ledger.jsonl").is_file() or (place / "versions.json").is_file()


def read_run(path: Path, rows: Sequence[Mapping[str, Any]] | None = None) -> RunRecord:
    """What its files say now; it may be written meanwhile.

    Args:
        rows: of its metrics.jsonl, where they were read already.
    """
    try:
        config = json.loads((path / "config.json").read_bytes())
        if not isinstance(config, dict):
            raise ValueError("config.json holds no object")
    except (OSError, ValueError, RecursionError) as error:
        return RunRecord(path, "unreadable", problem=f"config.json: {error}")
    rows = json_rows(path / "metrics.jsonl")[0] if rows is None else rows
    summary = json_object(path / "summary.json")
    settings = dict(_leaves(config, ""))
    evaluated, rewards, times = (_column(rows, name) for name in ("eval/accuracy", "reward", "time/step"))
    done = int(max(_column(rows, "step"), default=0))
    wanted = finite(settings.get("train.steps"))
    return RunRecord(
        path,
        _state(path, finished=bool(summary)),
        steps=done if (told := finite(summary.get("steps"))) is None else int(told),
        of_steps=None if wanted is None else int(wanted),
        first=evaluated[0] if evaluated else None,
        best=max(evaluated, default=None),
        accuracy=evaluated[-1] if evaluated else None,
        reward=rewards[-1] if rewards else None,
        seconds=finite(summary.get("seconds")) or sum(times) or None,
        findings=_num_findings(path, summary),
        settings=settings,
    )


def _state(path: Path, *, finished: bool) -> State:
    """By the newest lock's own words, and by when it was last touched; no lock is taken."""
    numbered = [(int(found[1]), entry) for entry in path.iterdir() if (found := _LOCK.fullmatch(entry.name))]
    if not numbered:
        return "finished" if finished else "stopped"
    newest = max(numbered)[1]
    try:
        if json_object(newest).get("released"):
            return "finished" if finished else "stopped"
        return "running" if time.time() - newest.stat().st_mtime < _SILENT_SECONDS else "killed"
    except OSError:
        return "stopped"


def _num_findings(path: Path, summary: Mapping[str, Any]) -> int:
    found = summary.get("findings")
    return len(found) if isinstance(found, list) else len(json_rows(path / "findings.jsonl")[0])


def whole_lines(file: Path, start: int = 0) -> tuple[list[bytes], int]:
    """Lines from byte `start`, and where the last one ends; one that is being written is not one yet. None where the
    file cannot be read."""
    try:
        with file.open("rb") as lines:
            lines.seek(start)
            found = lines.readlines()
    except OSError:
        return [], start
    if found and not found[-1].endswith(b"\n"):
        found.pop()
    return found, start + sum(map(len, found))


def json_rows(file: Path, start: int = 0) -> tuple[list[dict[str, Any]], int]:
    """The objects of `whole_lines`; a line that is damaged is left out."""
    rows: list[dict[str, Any]] = []
    lines, end = whole_lines(file, start)
    for line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows, end


def json_object(file: Path) -> dict[str, Any]:
    """The file's object; an empty one where there is none that can be read."""
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _leaves(value: Any, dotted: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _leaves(item, f"{dotted}.{key}" if dotted else str(key))
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        for number, item in enumerate(value):
            yield from _leaves(item, f"{dotted}.{number}")
    else:
        yield dotted, value


def _column(rows: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    return [value for row in rows if (value := finite(row.get(name))) is not None]


def finite(value: Any) -> float | None:
    """A file's number; None for what is none, for NaN and infinities, and for a whole number beyond all floats."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None
