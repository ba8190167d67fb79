"""One run, read on as it goes on: all that a page knows of it."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from groupwise.report.evals import Evaluations
from groupwise.report.facts import RunFacts
from groupwise.report.pieces import Pieces
from groupwise.report.rows import GroupEntry, RolloutIndex, columns
from groupwise.runs.reading import finite, json_rows


@dataclass(slots=True)
class MetricsSoFar:
    """`metrics.jsonl`, read on; `generation` counts how often it became shorter, as when a killed run goes on."""

    file: Path
    rows: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    generation: int = 0
    _read: int = 0

    def refresh(self) -> None:
        try:
            size = self.file.stat().st_size
        except OSError:
            size = 0
        if size < self._read:
            self.rows, self._read = [], 0
            self.generation += 1
        if size > self._read:
            rows, self._read = json_rows(self.file, self._read)
            self.rows += [row for row in rows if _is_step(row.get("step"))]

    def columns(self, start: int = 0) -> dict[str, Any]:
        """The values of rows from `start`, a list for each name; None where a step lacks it, and for NaN."""
        rows = self.rows[start:]
        names = dict.fromkeys(name for row in rows for name in row if name != "step")
        return {
            "steps": [row["step"] for row in rows],
            "columns": {name: [_number(row.get(name)) for row in rows] for name in names},
        }


class RunReader:
    """Reads, and never writes.

    Attributes:
        index: its rollouts.
        evals: its evaluations.

    Example:
        reader = RunReader(Path("runs/one"), "one")
        reader.refresh()
        reader.head()
    """

    def __init__(self, run: Path, name: str) -> None:
        self.run, self.name = run, name
        self.index = RolloutIndex(run)
        self.evals = Evaluations(run)
        self._facts = RunFacts(run, name)
        self._metrics = MetricsSoFar(run / "metrics.jsonl")
        self._pieces: Pieces | None = None

    @property
    def pieces(self) -> Pieces:
        """Looked for again while there is none: a run may save its tokenizer at its end."""
        if self._pieces is None or self._pieces.source is None:
            self._pieces = Pieces(self.run)
        return self._pieces

    def refresh(self) -> None:
        """Read what was written since."""
        self._facts.refresh()
        self._metrics.refresh()
        self.index.refresh()
        self.evals.refresh()

    @property
    def generation(self) -> int:
        """Changes when what was read is no longer so."""
        return self._metrics.generation + self.index.generation

    def head(self) -> dict[str, Any]:
        """Everything but texts and tokens; JSON-ready."""
        return {
            "generation": self.generation,
            "facts": self._facts.record(self._metrics.rows),
            "metrics": self._metrics.columns(),
            "groups": columns(self.index, self.index.groups),
            "evals": self.evals.record(),
            "damaged": self.index.damaged,
        }

    def changes(self, *, generation: int, steps: int, groups: int, samples: int, evals: int) -> dict[str, Any]:
        """What came after the first so many; all of it where the run began again meanwhile.

        Args:
            samples: of all those groups: a step that is being written may have got more.
            evals: the version of evaluations that is known.
        """
        known = self.index.groups[:groups]
        if generation != self.generation or sum(len(entry.rewards) for entry in known) != samples:
            return self.head() | {"anew": True}
        fresh = self.index.groups[groups:]
        return {
            "generation": generation,
            "facts": self._facts.record(self._metrics.rows),
            "metrics": self._metrics.columns(steps),
            "groups": columns(self.index, fresh, self._num_prompts(known)),
            "evals": None if evals == self.evals.version else self.evals.record(),
            "damaged": self.index.damaged,
        }

    @staticmethod
    def _num_prompts(known: list[GroupEntry]) -> int:
        return max((entry.prompt for entry in known), default=-1) + 1


def names_of(runs: list[Path]) -> list[str]:
    """What tells the runs apart: the last part of their paths, more of them where those are equal."""
    whole = [run.resolve() for run in runs]
    for depth in range(1, max((len(path.parts) for path in whole), default=1) + 1):
        names = [os.path.join(*path.parts[-depth:]) for path in whole]
        if len(set(names)) == len(set(whole)):
            return names
    return [str(path) for path in whole]


def _is_step(value: Any) -> bool:
    return isinstance(value, int) and finite(value) is not None


def _number(value: Any) -> float | int | None:
    return None if finite(value) is None else value
