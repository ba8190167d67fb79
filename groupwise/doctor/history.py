"""What the doctor remembers of a run: of each number that a rule reads, the first values and the newest."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

FIRST = 8
"""Values that stand for the beginning of a run."""


@dataclass(slots=True)
class Series:
    """One number over the steps that had it; values that are not finite are left out.

    Attributes:
        first: at most `FIRST` values.
        steps, values: the newest, of equal length.
    """

    first: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def add(self, step: int, value: float, *, kept: int) -> None:
        if len(self.first) < FIRST:
            self.first.append(value)
        self.steps = [*self.steps, step][-kept:]
        self.values = [*self.values, value][-kept:]


class History:
    """The numbers of a run's steps; its whole state is plain.

    Args:
        names: that rules read; one that ends with `*` stands for all that begin so.
        kept: newest values of each.

    Example:
        history = History({"reward", "low/*"}, kept=60)
        history.add(1, {"reward": 0.5, "loss": 0.1})
        history.last("reward", 1)     # [0.5]
    """

    def __init__(self, names: Collection[str], *, kept: int) -> None:
        self.step = 0
        self._exact = {name for name in names if not name.endswith("*")}
        self._beginnings = tuple(name[:-1] for name in names if name.endswith("*"))
        self._kept = kept
        self._series: dict[str, Series] = {}

    def add(self, step: int, numbers: Mapping[str, float]) -> None:
        """Take what rules read of the numbers of `step`; steps rise from call to call."""
        self.step = step
        for name, value in numbers.items():
            if math.isfinite(value) and (name in self._exact or name.startswith(self._beginnings)):
                self._series.setdefault(name, Series()).add(step, value, kept=self._kept)

    def now(self, name: str) -> float | None:
        """This step's value."""
        found = self.last(name, 1)
        return found[0] if found else None

    def last(self, name: str, count: int) -> list[float] | None:
        """The newest `count` values, this step's at the end; None where there are fewer, or this step has none."""
        series = self._series.get(name)
        if series is None or series.steps[-1] != self.step or len(series.values) < count:
            return None
        return series.values[-count:]

    def known(self, name: str) -> list[float]:
        """All values that are kept, whether or not this step has one."""
        return list(self._series[name].values) if name in self._series else []

    def first(self, name: str) -> list[float] | None:
        """The run's first values; None before there are `FIRST`."""
        series = self._series.get(name)
        return list(series.first) if series is not None and len(series.first) == FIRST else None

    def after(self, beginning: str) -> Iterable[str]:
        """What follows `beginning` in the names that this step has, in order."""
        for name, series in self._series.items():
            if name.startswith(beginning) and series.steps[-1] == self.step:
                yield name[len(beginning) :]

    def state_dict(self) -> dict[str, Any]:
        series = {
            name: {"first": list(one.first), "steps": list(one.steps), "values": list(one.values)}
            for name, one in self._series.items()
        }
        return {"step": self.step, "series": series}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.step = int(state["step"])
        self._series = {
            name: Series(list(one["first"]), list(one["steps"]), list(one["values"]))
            for name, one in state["series"].items()
        }
