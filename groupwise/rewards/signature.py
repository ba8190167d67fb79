"""What a reward function takes, found once, and its call's arguments, built per group."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from groupwise.errors import ConfigError, nearest
from groupwise.rewards.copies import independent, independent_arguments
from groupwise.texts import one_line
from groupwise.types import Prompt, Rollout

ANSWERS = ("prompts", "completions", "completion_ids")
STANDARD_ARGUMENTS = (*ANSWERS, "rendered_prompts")
_LONGEST_NAME = 80


@dataclass(frozen=True, slots=True)
class Signature:
    """The arguments of one reward function.

    Attributes:
        accepted: names that it takes.
        takes_all: it has `**columns`.
        needed_columns: names without a default that neither the scorer nor `reward.args` gives.
        is_async: calling it gives something to await.
        file: where its code is, or "" when that is unknown.

    Example:
        Signature(accepted=("completions", "answer"), takes_all=False, needed_columns=("answer",), is_async=False,
                  file="my_rewards.py")
    """

    accepted: tuple[str, ...]
    takes_all: bool
    needed_columns: tuple[str, ...]
    is_async: bool
    file: str

    def takes(self, name: str) -> bool:
        return self.takes_all or name in self.accepted

    def missing(self, columns: Mapping[str, Any]) -> tuple[str, ...]:
        """Needed columns that these are not."""
        return tuple(name for name in self.needed_columns if name not in columns)


def read_signature(function: Callable[..., Any], *, name: str, args: Mapping[str, Any]) -> Signature:
    """Find out what a reward function takes.

    Args:
        function: the reward.
        name: how the user calls it, for messages.
        args: keyword arguments bound by the user's config.

    Raises:
        ConfigError: it cannot be called by keyword, takes nothing of what rewards are given, or `args` holds a name
            that it does not take.
    """
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"reward {name!r}: its arguments cannot be found out ({error}); wrap it in a Python function "
            "def reward(completions, **columns)"
        ) from error
    by_name = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    for parameter in parameters:
        if parameter.kind is parameter.POSITIONAL_ONLY and parameter.default is parameter.empty:
            raise ConfigError(
                f"reward {name!r}: its argument {parameter.name!r} can only be given by position, and rewards are "
                "called by keyword; remove the '/' from its signature, or wrap it"
            )
    accepted = tuple(p.name for p in by_name)
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    if not takes_all and not set(ANSWERS) & set(accepted):
        raise ConfigError(
            f"reward {name!r} takes ({', '.join(accepted)}), so it sees no answer and is no reward function; expected "
            f"one that names at least one of {', '.join(ANSWERS)}, or **columns"
        )
    _check_bound(name, args, accepted, takes_all=takes_all)
    given = {*STANDARD_ARGUMENTS, *args}
    needed = tuple(p.name for p in by_name if p.default is p.empty and p.name not in given)
    return Signature(accepted, takes_all, needed, _is_async(function), _file_of(function))


def function_name(function: Callable[..., Any]) -> str:
    """A short name for metrics and messages."""
    if isinstance(function, functools.partial):
        return function_name(function.func)
    if inspect.isroutine(function) or inspect.isclass(function):
        return one_line(function.__name__.strip("<>"), limit=_LONGEST_NAME)
    return one_line(type(function).__name__, limit=_LONGEST_NAME)


def group_arguments(
    signature: Signature, prompt: Prompt, *, rollouts: Sequence[Rollout], args: Mapping[str, Any]
) -> dict[str, Any]:
    """The keyword arguments of one call: every list is `[G]`, and nothing in it that could be changed is shared.

    The rendered prompt goes to functions that name `rendered_prompts`, and not to `**columns`.
    """
    size = len(rollouts)
    made: dict[str, Callable[[], Any]] = {
        name: functools.partial(independent, value, size) for name, value in prompt.columns.items()
    }
    if prompt.messages:
        made["prompts"] = lambda: independent([dict(message) for message in prompt.messages], size)
        made["completions"] = lambda: [_messages(rollout) for rollout in rollouts]
    else:
        made["prompts"] = lambda: [prompt.text] * size
        made["completions"] = lambda: [rollout.text for rollout in rollouts]
    made["completion_ids"] = lambda: [list(rollout.token_ids) for rollout in rollouts]
    if "rendered_prompts" in signature.accepted:
        made["rendered_prompts"] = lambda: [prompt.text] * size
    arguments = {name: make() for name, make in made.items() if signature.takes(name)}
    return arguments | independent_arguments(args)


def _messages(rollout: Rollout) -> list[dict[str, Any]]:
    """What follows the prompt, as a conversation: turns, and an environment's messages; what it put into a turn is part
    of that turn."""
    messages: list[dict[str, Any]] = []
    continues = False  # the last message is a turn that goes on
    for segment in rollout.segments:
        if segment.messages:
            messages.extend(dict(message) for message in segment.messages)
            continues = False
        elif continues:
            messages[-1]["content"] += segment.text
        else:
            messages.append({"role": "assistant", "content": segment.text})
            continues = True
    return messages


def require_columns(signature: Signature, prompt: Prompt, *, name: str) -> None:
    """Check that a row has what a reward needs.

    Raises:
        ConfigError: naming the reward, the missing columns and the present ones.
    """
    missing = signature.missing(prompt.columns)
    if missing:
        present = ", ".join(sorted(prompt.columns)) or "none"
        raise ConfigError(
            f"reward {name!r} needs the column{'s' if len(missing) > 1 else ''} {', '.join(missing)}, which row "
            f"{prompt.uid!r} does not have; it has: {present}. Rename the column or the function's argument, give the "
            "argument a default, or set it in the reward's args"
        )


def _check_bound(name: str, args: Mapping[str, Any], accepted: Sequence[str], *, takes_all: bool) -> None:
    free = [argument for argument in accepted if argument not in STANDARD_ARGUMENTS]
    for given in args:
        if given in STANDARD_ARGUMENTS:
            raise ConfigError(f"reward {name!r}: args may not set {given!r}, which every call gives; remove it")
        if given not in free and not takes_all:
            hint = nearest(given, free, "did you mean {!r}? ")
            raise ConfigError(
                f"reward {name!r} takes no argument {given!r}; {hint}valid ones: {', '.join(free) or 'none'}"
            )


def _is_async(function: Callable[..., Any]) -> bool:
    if isinstance(function, functools.partial):
        return _is_async(function.func)
    if inspect.isroutine(function) or inspect.isclass(function):
        return inspect.iscoroutinefunction(function)
    return inspect.iscoroutinefunction(type(function).__call__)


def _file_of(function: Callable[..., Any]) -> str:
    if isinstance(function, functools.partial):
        return _file_of(function.func)
    try:
        return inspect.getfile(inspect.unwrap(function) if inspect.isroutine(function) else type(function))
    except (TypeError, OSError):
        return ""
