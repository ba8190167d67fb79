"""What an object from a file holds, checked as it is taken out."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import NoneType
from typing import Any, get_args

_NAMES = {
    NoneType: "null",
    str: "text",
    dict: "an object",
    list: "a list",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
}


_LARGEST = int(sys.float_info.max)
"""JSON has whole numbers beyond all floats."""


def number(value: float | None) -> float:
    """JSON has no NaN: null stands for it."""
    return math.nan if value is None else value


@dataclass(frozen=True, slots=True)
class Fields:
    """An object from a file, whose values are what they must be, or refused with a ValueError."""

    row: Mapping[str, Any]

    def has(self, name: str) -> bool:
        return name in self.row

    def get(self, name: str, *kinds: type) -> Any:
        if name not in self.row:
            raise ValueError(f'got no "{name}"')
        value = self.row[name]
        if type(value) not in kinds:
            raise ValueError(f'got "{name}" as {_names([type(value)])}; expected {_names(kinds)}')
        if float in kinds and type(value) is int:
            _check_fits(name, [value])
        return value

    def size(self, name: str) -> int:
        """A number of things."""
        value = self.get(name, int)
        if value < 0:
            raise ValueError(f'got "{name}" = {value}; expected 0 or more')
        return value

    def list_of(self, name: str, *kinds: type) -> list[Any]:
        values = self.get(name, list)
        found = set(map(type, values))
        if wrong := found.difference(kinds):
            raise ValueError(f'got "{name}" with {_names(wrong)} in it; expected {_names(kinds)}')
        if float in kinds and int in found:
            _check_fits(name, [value for value in values if type(value) is int])
        return values

    def numbers(self, name: str) -> tuple[float, ...]:
        """`[T]`, with NaN for null."""
        values = self.list_of(name, float, int, NoneType)
        return tuple(map(number, values)) if None in values else tuple(values)

    def rewards(self) -> dict[str, float | None]:
        rewards = Fields(self.get("rewards", dict))
        return {name: rewards.get(name, float, int, NoneType) for name in rewards.row}

    def word(self, name: str, allowed: Any) -> Any:
        """One of a `Literal`."""
        value = self.get(name, str)
        if value not in get_args(allowed):
            raise ValueError(f'got "{name}" = {value!r}; expected one of {", ".join(get_args(allowed))}')
        return value


def _check_fits(name: str, values: Iterable[int]) -> None:
    if any(abs(value) > _LARGEST for value in values):
        raise ValueError(f'got "{name}" with a number of more than 308 digits; expected one that a float can hold')


def _names(kinds: Iterable[type]) -> str:
    return " or ".join(sorted(_NAMES.get(kind, kind.__name__) for kind in kinds))
