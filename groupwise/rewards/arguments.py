"""Checks of the settings that built-in rewards take from `reward.args`."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

from groupwise.config.secrets import REFERENCE
from groupwise.errors import ConfigError


def from_environment(value: Any, *, reward: str) -> Any:
    """The value with `"env:NAME"`, wherever it stands, as what the environment variable NAME holds: a secret that is
    given so stands in no config.

    Raises:
        ConfigError: there is no such variable.
    """
    if isinstance(value, Mapping):
        return {key: from_environment(item, reward=reward) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [from_environment(item, reward=reward) for item in value]
    if not isinstance(value, str) or not value.startswith(REFERENCE):
        return value
    name = value.removeprefix(REFERENCE)
    if name not in os.environ:
        raise ConfigError(f"reward {reward!r}: got {value!r}, and no environment variable {name!r} is set; export it")
    return os.environ[name]


def finite_number(value: Any, *, reward: str, name: str) -> float:
    """The setting as a float.

    Raises:
        ConfigError: it is no finite number.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(f"reward {reward!r}: {name} = {value!r} is not a finite number; give one, such as 1.0")
    return float(value)


def positive_count(value: Any, *, reward: str, name: str) -> int:
    """The setting as an int of at least 1.

    Raises:
        ConfigError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"reward {reward!r}: {name} = {value!r} is not a whole number of at least 1")
    return value


def text(value: Any, *, reward: str, name: str) -> str:
    """The setting as a string that is not empty.

    Raises:
        ConfigError: it is not.
    """
    if not isinstance(value, str) or not value:
        raise ConfigError(f"reward {reward!r}: {name} = {value!r} is not text; give a string that is not empty")
    return value


def flag(value: Any, *, reward: str, name: str) -> bool:
    """The setting as a bool.

    Raises:
        ConfigError: it is none.
    """
    if not isinstance(value, bool):
        raise ConfigError(f"reward {reward!r}: {name} = {value!r} is neither true nor false")
    return value


def must_differ(reward: str, *others: float, **scores: float) -> None:
    """Refuse scores that are all the same: whatever the answer, it would get that.

    Args:
        others: what answers can get besides.

    Raises:
        ConfigError: they are.
    """
    if len({*others, *scores.values()}) == 1:
        shown = " and ".join(f"{name} = {value:g}" for name, value in scores.items())
        raise ConfigError(
            f"reward {reward!r}: with {shown}, every answer gets the same, and nothing is learned from it"
        )
