"""The built-in rewards by name: one line each."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from groupwise.errors import ConfigError, nearest
from groupwise.rewards.earnable import (
    PromptCheck,
    exact_match_prompt_check,
    format_marks,
    format_prompt_check,
    gsm8k_marks,
    think_marks,
    think_prompt_check,
)
from groupwise.rewards.format import format_reward, think_format_reward
from groupwise.rewards.gsm8k import gsm8k_reward, gsm8k_row_check
from groupwise.rewards.length import overlong_reward
from groupwise.rewards.match import exact_match_reward, exact_match_row_check


@dataclass(frozen=True, slots=True)
class BuiltIn:
    """A built-in reward.

    Attributes:
        make: from `reward.args` to the reward function.
        row_check: from `reward.args` to a check of one row, run before a model is loaded.
        prompt_check: from `reward.args` to a check that an answer to one prompt can earn it, run then too.
        marks: from `reward.args` to what every answer that earns it has, with more text after it.
        data_sources: rows with one of these need no other reward.

    Example:
        BuiltIn(gsm8k_reward, gsm8k_row_check, data_sources=("openai/gsm8k",))
    """

    make: Callable[..., Callable[..., Any]]
    row_check: Callable[..., Callable[[Mapping[str, Any]], None]] | None = None
    prompt_check: Callable[..., PromptCheck] | None = None
    marks: Callable[..., tuple[str, ...]] | None = None
    data_sources: tuple[str, ...] = ()


BUILT_INS: Mapping[str, BuiltIn] = {
    "gsm8k": BuiltIn(gsm8k_reward, gsm8k_row_check, marks=gsm8k_marks, data_sources=("openai/gsm8k",)),
    "format": BuiltIn(format_reward, prompt_check=format_prompt_check, marks=format_marks),
    "think_format": BuiltIn(think_format_reward, prompt_check=think_prompt_check, marks=think_marks),
    "exact_match": BuiltIn(exact_match_reward, exact_match_row_check, prompt_check=exact_match_prompt_check),
    "overlong": BuiltIn(overlong_reward),
}


def reward_names() -> tuple[str, ...]:
    """The names of the built-in rewards."""
    return tuple(BUILT_INS)


def built_in(name: str) -> BuiltIn:
    """The built-in reward of this name.

    Raises:
        ConfigError: there is none; the message has the nearest name.
    """
    if name not in BUILT_INS:
        hint = nearest(name, BUILT_INS, "did you mean {!r}? ")
        raise ConfigError(
            f"unknown reward {name!r}; {hint}expected one of {', '.join(BUILT_INS)}, or a function of your own as "
            "path/to/file.py:function or module:function"
        )
    return BUILT_INS[name]


def reward_for(data_source: str) -> str | None:
    """The built-in reward that is made for rows of this data source."""
    return next((name for name, reward in BUILT_INS.items() if data_source in reward.data_sources), None)


def check_args(name: str, args: Mapping[str, Any]) -> None:
    """Refuse arguments that a built-in reward does not take, and missing ones that it needs.

    Raises:
        ConfigError: naming the argument and the valid ones.
    """
    parameters = inspect.signature(built_in(name).make).parameters
    valid = ", ".join(parameters)
    for given in args:
        if given not in parameters:
            hint = nearest(given, parameters, "did you mean {!r}? ")
            raise ConfigError(f"reward {name!r} takes no argument {given!r}; {hint}valid ones: {valid}")
    for parameter in parameters.values():
        if parameter.default is inspect.Parameter.empty and parameter.name not in args:
            raise ConfigError(f"reward {name!r} needs the argument {parameter.name!r}; set it in the reward's args")
