"""Copies of a row's values, so that no call of a reward sees what another one changed.

Whatever cannot be changed (text, numbers, dates, …) is shared: it is the bulk of most rows. Lists and dicts of such
values are copied whole at the speed of C, larger trees of plain values by `marshal`, others are walked.
"""

from __future__ import annotations

import copy
import datetime
import decimal
import fractions
import logging
import marshal
import types
import uuid
from collections.abc import Mapping
from typing import Any

_log = logging.getLogger("groupwise.rewards")

_FROZEN: frozenset[type] = frozenset(
    {
        *(type(None), bool, int, float, complex, str, bytes, range, type, type(...)),
        *(decimal.Decimal, fractions.Fraction, uuid.UUID),
        *(datetime.date, datetime.datetime, datetime.time, datetime.timedelta, datetime.timezone),
        *(types.FunctionType, types.BuiltinFunctionType, types.ModuleType),
    }
)
_PLAIN: frozenset[type] = frozenset({type(None), bool, int, float, str})
_TREE = frozenset({*_PLAIN, list, dict})
_MANY = 16
_warned: set[type] = set()


def independent(value: Any, count: int) -> list[Any]:
    """`count` copies of the value, none of which shares with it, or with another, anything that can be changed.

    An object that refuses to be copied (an open file, say) is given as it is, with a warning.

    Example:
        >>> one, two = independent({"allowed": ["a"]}, 2)
        >>> one["allowed"].clear()
        >>> two
        {'allowed': ['a']}
    """
    try:
        return _copies(value, count)
    except (RecursionError, ValueError) as error:  # it refers to itself, or lies too deep
        return _deep(value, count, error)


def independent_arguments(values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of each value."""
    return {name: independent(value, 1)[0] for name, value in values.items()}


def _copies(value: Any, count: int) -> list[Any]:
    kind = type(value)
    if kind in _FROZEN:
        return [value] * count
    if kind is list:
        return _lists(value, count)
    if kind is dict:
        return _dicts(value, count)
    if kind is tuple:
        return [tuple(entries) for entries in _lists(list(value), count)]
    return _deep(value, count)


def _lists(value: list[Any], count: int) -> list[list[Any]]:
    if _FROZEN.issuperset(map(type, value)):
        return [value.copy() for _ in range(count)]
    if _is_many_small(value, value[0]) and _is_plain(value):
        return _marshalled(value, count)
    columns = [_copies(entry, count) for entry in value]
    return [list(entries) for entries in zip(*columns, strict=True)]


def _dicts(value: dict[Any, Any], count: int) -> list[dict[Any, Any]]:
    if _FROZEN.issuperset(map(type, value.values())):
        return [value.copy() for _ in range(count)]
    if _is_many_small(value, next(iter(value.values()))) and _is_plain(value):
        return _marshalled(value, count)
    columns = [_copies(entry, count) for entry in value.values()]
    return [dict(zip(value, entries, strict=True)) for entries in zip(*columns, strict=True)]


def _is_many_small(value: list[Any] | dict[Any, Any], first: Any) -> bool:
    """Whether it looks like many small containers: walking them is slow, and `marshal` copies their texts too."""
    return len(value) >= _MANY and (type(first) is list or type(first) is dict) and len(first) < _MANY


def _is_plain(value: list[Any] | dict[Any, Any]) -> bool:
    """Whether it is what JSON can hold, by exact types: `marshal` turns some others into something else."""
    entries: Any = value
    if type(value) is dict:
        if not _PLAIN.issuperset(map(type, value)):
            return False
        entries = value.values()
    found = set(map(type, entries))
    if found <= _PLAIN:
        return True
    return found <= _TREE and all(_is_plain(entry) for entry in entries if type(entry) is list or type(entry) is dict)


def _marshalled(value: Any, count: int) -> list[Any]:
    written = marshal.dumps(value)
    return [marshal.loads(written) for _ in range(count)]


def _deep(value: Any, count: int, reason: Exception | None = None) -> list[Any]:
    try:
        return [copy.deepcopy(value) for _ in range(count)]
    except Exception as error:  # noqa: BLE001 - copying an object is its own code
        return _shared(value, count, reason or error)


def _shared(value: Any, count: int, error: Exception) -> list[Any]:
    if type(value) not in _warned:
        _warned.add(type(value))
        _log.warning(
            "a %s in the data cannot be copied (%s): all calls of rewards get the same one; do not change it there",
            type(value).__name__,
            type(error).__name__,
        )
    return [value] * count
