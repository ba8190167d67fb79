"""Reads the files of `trajectories/`, one row at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from groupwise.errors import DataError
from groupwise.files import file_error
from groupwise.trajectories.parsing import eval_from_json, from_json
from groupwise.trajectories.rows import EvalTrajectoryRow, TrajectoryRow

FOLDER = "trajectories"
STEP_FILE = "step_{:06d}.jsonl"
EVAL_FILE = "eval_{:06d}.jsonl"

_Row = TypeVar("_Row")


def read_trajectories(run: str | Path, steps: Container[int] | None = None) -> Iterator[TrajectoryRow]:
    """The rollouts of a run, step by step, one at a time: a run may be larger than memory.

    What a killed run left half-written at the end of a file is passed over.

    Args:
        run: a run directory, also of a run that goes on.
        steps: only of these, such as `range(10, 20)`; None is all that there are.

    Raises:
        DataError: the run keeps no trajectories; while reading, a row is damaged or of a newer format.
        FileError: while reading, a file cannot be read.

    Example:
        best = max(read_trajectories("runs/one", steps=[40]), key=lambda row: row.reward or 0.0)
    """
    return _of_files(_files(Path(run), "step", steps), from_json)


def read_eval_trajectories(run: str | Path, steps: Container[int] | None = None) -> Iterator[EvalTrajectoryRow]:
    """The evaluated samples of a run, as `read_trajectories`; `steps` are those after which it was evaluated."""
    return _of_files(_files(Path(run), "eval", steps), eval_from_json)


def read_trajectory_file(path: str | Path) -> Iterator[TrajectoryRow]:
    """The rows of one file, as `read_trajectories`."""
    return _of_files([Path(path)], from_json)


def read_eval_file(path: str | Path) -> Iterator[EvalTrajectoryRow]:
    """The rows of one file, as `read_eval_trajectories`; also of `groupwise eval --save`."""
    return _of_files([Path(path)], eval_from_json)


def numbered_files(run: Path, kind: Literal["step", "eval"]) -> dict[int, Path]:
    """The files of a run's rollouts, or of its evaluations, by step, in order; none where it keeps none.

    Raises:
        OSError: the folder cannot be read.
    """
    folder = run / FOLDER
    if not folder.is_dir():
        return {}
    found = ((re.fullmatch(rf"{kind}_(\d+)\.jsonl", file.name), file) for file in folder.iterdir())
    return dict(sorted((int(match[1]), file) for match, file in found if match))


def _files(run: Path, kind: Literal["step", "eval"], steps: Container[int] | None) -> list[Path]:
    if not (run / FOLDER).is_dir():
        raise DataError(
            f"{run}: got no folder {FOLDER}/ there; expected the directory of a run with train.trajectories = true"
        )
    return [file for step, file in numbered_files(run, kind).items() if steps is None or step in steps]


def _of_files(files: Sequence[Path], parse: Callable[[Mapping[str, Any]], _Row]) -> Iterator[_Row]:
    for path in files:
        try:
            with open(path, "rb") as file:
                for number, line in enumerate(file, start=1):
                    values = _object_of(line, where=f"{path}:{number}")
                    if values is not None:
                        yield _parsed(values, parse, where=f"{path}:{number}")
        except OSError as error:
            raise file_error(error, path, doing="read") from error


def _object_of(line: bytes, *, where: str) -> Mapping[str, Any] | None:
    """A line's object; None for the half line that a killed writer leaves."""
    try:
        values = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        if not line.endswith(b"\n"):
            return None
        raise DataError(
            f"{where}: got a line that is not JSON ({error}); expected a row of trajectories; remove the line"
        ) from None
    if not isinstance(values, dict):
        raise DataError(f"{where}: got a line that is no object; expected a row of trajectories; remove the line")
    return values


def _parsed(values: Mapping[str, Any], parse: Callable[[Mapping[str, Any]], _Row], *, where: str) -> _Row:
    try:
        return parse(values)
    except ValueError as error:
        raise DataError(f"{where}: the row cannot be read: {error}") from None
