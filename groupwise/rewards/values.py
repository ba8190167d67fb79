"""What a reward function may return, and nothing else."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Collection, Coroutine, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any


class BadReturn(Exception):
    """A reward returned something that is not one value per completion; caught where rewards are called."""


@dataclass(frozen=True, slots=True)
class Graded:
    """The answers of one reward for one group.

    Attributes:
        values: `[G]`; None where the reward does not apply or its value is no reward.
        problems: `[G]`; why a value is no reward, or "".

    Example:
        Graded(values=(1.0, None), problems=("", "returned nan, expected a finite number or None"))
    """

    values: tuple[float | None, ...]
    problems: tuple[str, ...]


def grade(returned: Any, size: int) -> Graded:
    """Check and convert what a reward returned for `size` completions.

    Numbers of any kind count, numpy's and torch's too, and so do lists, tuples and one-dimensional arrays of them.
    A list of another length is never stretched or cut.

    Raises:
        BadReturn: it is no list, or one of the wrong length.
    """
    if isinstance(returned, Coroutine):
        returned.close()
        raise BadReturn("returned a coroutine; declare the function itself `async def`")
    items = _items(returned)
    if items is None:
        raise BadReturn(
            f"returned {reprlib.repr(returned)} ({type(returned).__name__}), expected a list of {size} numbers or "
            "None, one per completion"
        )
    if len(items) != size:
        raise BadReturn(f"returned {len(items)} values for {size} completions, expected one per completion")
    values: list[float | None] = []
    problems: list[str] = []
    for item in items:
        value = None if item is None else _number(item)
        usable = value is not None and math.isfinite(value)
        values.append(value if usable else None)
        problems.append("" if usable or item is None else _problem(item))
    return Graded(tuple(values), tuple(problems))


def _items(returned: Any) -> list[Any] | None:
    if not isinstance(returned, Collection) or isinstance(returned, str | bytes | bytearray | Mapping | AbstractSet):
        return None
    try:
        return list(returned)
    except TypeError:  # an array without dimensions has a length and an iterator only in name
        return None


def _number(item: Any) -> float | None:
    if isinstance(item, str | bytes | bytearray):
        return None
    try:
        return float(item)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return None


def _problem(item: Any) -> str:
    return f"returned {reprlib.repr(item)} ({type(item).__name__}), expected a finite number or None"
