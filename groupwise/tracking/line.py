"""A step's line: the shown metrics, in an order that stays, as many as fit."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from rich.cells import cell_len

from groupwise.texts import one_line

_REWARD_MEAN = re.compile(r"rewards/(.+)/mean")
_GAP = "  "
_LONGEST_NAME = 20  # characters of a reward's name


@dataclass(frozen=True, slots=True)
class Column:
    """A metric that is shown: its name, its label, and a format for its value.

    Attributes:
        rank: of columns that do not all fit, those with the lowest ranks stay.
    """

    metric: str
    label: str
    format: str
    rank: int


_REWARD = Column("reward", "reward", "{:.3f}", 0)
_ACCURACY = Column("eval/accuracy", "accuracy", "{:.1%}", 1)
COLUMNS = (
    _REWARD,
    Column("", "", "{:.3f}", 5),  # in its place, each reward's own
    _ACCURACY,
    Column("frac_reward_zero_std", "equal", "{:.0%}", 2),
    Column("completions/clipped_ratio", "cut", "{:.0%}", 4),
    Column("loss", "loss", "{:.4f}", 3),
    Column("kl", "kl", "{:.4f}", 7),
    Column("completions/mean_length", "length", "{:.0f}", 6),
    Column("throughput/tokens_per_second", "tok/s", "{:.0f}", 9),
    Column("time/step", "seconds", "{:.1f}", 8),
)


@dataclass(frozen=True, slots=True)
class _Cell:
    """One column of one step; `short` is what it comes down to where `text` does not fit."""

    text: str
    short: str
    rank: int


def step_line(head: str, metrics: Mapping[str, float], *, accuracy_of: str = "", width: int | None = None) -> str:
    """A step's metrics, as `step 3/20  reward 0.512  equal 25%  …`; a value that is no number shows as `nan`.

    Args:
        head: what the line begins with, in any case.
        accuracy_of: the reward that is counted, to stand before its label where there is room.
        width: columns of the terminal; None is as long as it comes.
    """
    cells = list(_cells(metrics, accuracy_of=accuracy_of))
    room = math.inf if width is None else width - cell_len(head)
    shown: dict[int, str] = {}
    for index in sorted(range(len(cells)), key=lambda index: cells[index].rank):
        for text in dict.fromkeys((cells[index].text, cells[index].short)):
            needed = cell_len(_GAP + text)
            if needed <= room:
                shown[index] = text
                room -= needed
                break
    return _GAP.join([head, *(shown[index] for index in sorted(shown))])


def _cells(metrics: Mapping[str, float], *, accuracy_of: str) -> Iterator[_Cell]:
    for column in COLUMNS:
        if not column.metric:
            yield from _own_rewards(metrics, column)
        elif (value := metrics.get(column.metric)) is not None:
            short = f"{column.label} {_number(value, column.format)}"
            text = f"{accuracy_of} {short}" if accuracy_of and column is _ACCURACY else short
            yield _Cell(text, short, column.rank)


def _own_rewards(metrics: Mapping[str, float], column: Column) -> Iterator[_Cell]:
    """Each reward's own mean, where there are several."""
    names = [match[1] for match in map(_REWARD_MEAN.fullmatch, metrics) if match]
    for name in names if len(names) > 1 else ():
        text = f"{one_line(name, limit=_LONGEST_NAME)} {_number(metrics[f'rewards/{name}/mean'], column.format)}"
        yield _Cell(text, text, column.rank)


def _number(value: float, form: str) -> str:
    return form.format(value) if math.isfinite(value) else str(value)
