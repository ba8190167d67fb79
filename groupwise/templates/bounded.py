"""The limits of chat templates: a template is a program of others, and must neither hang nor fill the memory.

transformers compiles templates in a sandbox of jinja2's, which guards what they reach, not what they cost. Within
`limited`, every pass of a loop, call and filter looks at the clock, and no value grows beyond a bound;
`groupwise.templates.counting` puts these checks into what is compiled. What a template writes stays the same.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any

SECONDS = 5.0
"""Longest time that one rendering may take."""
MOST_CHARACTERS = 16_000_000
"""Of a text and of the whole rendering; an item of a list counts as 16."""
_MOST_WRITTEN = 10 * MOST_CHARACTERS  # of all that macros and blocks write, too, which the rendering may hold again
MOST_CALLS = 100
"""Macros within macros."""
MOST_WIDTH = 100_000
"""Largest number that fills, indents or cuts a text."""
MOST_SOURCE = 200_000
"""Characters of the template itself."""
_ITEM = 16
_MOST_BITS = 4096

# Widths and precisions of six digits and more, and those that an argument gives.
_PERCENT_WIDTH = re.compile(r"%(?:\([^)]*\))?[-#0 +]*(?:\d*\.)?(?:\d{6,}|\*)")
_BRACE_WIDTH = re.compile(r"\{[^{}]*:[^{}]*(?:\d{6,}|\{)")


class TemplateLimitError(RuntimeError):
    """A template did more than it may; the message says what."""


@dataclass(slots=True)
class _Budget:
    deadline: float
    calls: int = 0
    written: int = 0  # characters


_budget: ContextVar[_Budget | None] = ContextVar("budget", default=None)


@contextmanager
def limited(source: str = "") -> Iterator[None]:
    """Within it, chat templates that transformers renders in this thread are bounded.

    Args:
        source: of the template that comes.

    Raises:
        TemplateLimitError: the source is too long; or, inside, the rendering costs too much.
    """
    if len(source) > MOST_SOURCE:
        raise TemplateLimitError(f"it has {len(source):,} characters, and may have {MOST_SOURCE:,}")
    _use_counting_environment()
    token = _budget.set(_Budget(time.monotonic() + SECONDS))
    try:
        yield
    finally:
        _budget.reset(token)


def is_limited() -> bool:
    return _budget.get() is not None


def check_time() -> None:
    """Raises TemplateLimitError after the deadline."""
    budget = _budget.get()
    if budget is not None and time.monotonic() > budget.deadline:
        raise TemplateLimitError(f"it ran for more than {SECONDS:g} s")


@contextmanager
def one_call() -> Iterator[None]:
    """Around everything that a template calls.

    Raises:
        TemplateLimitError: it calls itself too often, or the time is over.
    """
    check_time()
    budget = _budget.get()
    if budget is None:
        yield
        return
    budget.calls += 1
    try:
        if budget.calls > MOST_CALLS:
            raise TemplateLimitError(f"it calls itself more than {MOST_CALLS} times in one another")
        yield
    finally:
        budget.calls -= 1


def weight(value: Any, most: int = MOST_CHARACTERS) -> int:
    """Characters of the value, as often as they would be written out; it stops counting beyond `most`."""
    if isinstance(value, str | bytes):
        return len(value)
    if not isinstance(value, list | tuple | Mapping):
        return 1
    parts: Sequence[Any] = [*value.keys(), *value.values()] if isinstance(value, Mapping) else value
    total = len(parts) * _ITEM
    for part in parts:
        if total > most:
            break
        total += weight(part, most - total)
    return total


def check_size(size: int) -> None:
    """Raises TemplateLimitError where it is more than a value may have."""
    if size > MOST_CHARACTERS:
        raise TemplateLimitError(f"it makes a value of more than {MOST_CHARACTERS:,} characters")


def bounded(value: Any) -> Any:
    """The value.

    Raises:
        TemplateLimitError: it is too large.
    """
    check_size(weight(value))
    return value


def bounded_items(items: Iterable[Any]) -> Iterator[Any]:
    """The items, until the time is over or they are too large together."""
    total = 0
    for item in items:
        check_time()
        total += _ITEM + weight(item)
        check_size(total)
        yield item


def written(value: Any) -> Any:
    """The value that is about to be written somewhere.

    Raises:
        TemplateLimitError: too much was written before.
    """
    budget = _budget.get()
    if budget is not None:
        budget.written += weight(value)
        if budget.written > _MOST_WRITTEN:
            raise TemplateLimitError(f"it writes more than {_MOST_WRITTEN:,} characters")
    return value


def check_operation(operator: str, left: Any, right: Any) -> None:
    """Refuse an operation whose result would be too large, before it is made.

    Raises:
        TemplateLimitError: it would be.
    """
    check_time()
    if operator == "+":
        check_size(weight(left) + weight(right))
    elif operator == "%" and isinstance(left, str):
        check_percent_format(left, right)
    elif isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() + right.bit_length() if operator == "*" else left.bit_length() * max(0, right)
        if operator in ("*", "**") and bits > _MOST_BITS:
            raise TemplateLimitError("it makes a number of more than a thousand digits")
    elif operator == "*":
        times, value = (left, right) if isinstance(left, int) else (right, left)
        if isinstance(times, int):
            check_size(times * max(_ITEM if isinstance(value, list | tuple) else 1, weight(value)))


def check_percent_format(text: str, values: Any) -> None:
    """As `check_operation`, for `text % values`."""
    _check_width(_PERCENT_WIDTH.search(text))
    check_size(len(text) + text.count("%") * weight(values))


def check_brace_format(text: str, values: Sequence[Any]) -> None:
    """As `check_operation`, for `text.format(values)`."""
    _check_width(_BRACE_WIDTH.search(text))
    check_size(len(text) + text.count("{") * weight(values))


def _check_width(found: re.Match[str] | None) -> None:
    if found:
        raise TemplateLimitError(f"it formats with {found[0][:30]!r}, and widths may be {MOST_WIDTH:,} at most")


def check_widths(arguments: Iterable[Any], most: int = MOST_WIDTH) -> None:
    """Refuse a number that would make a text too wide.

    Raises:
        TemplateLimitError: it would.
    """
    for argument in arguments:
        if isinstance(argument, int) and abs(argument) > most:
            raise TemplateLimitError(f"it fills or repeats something to {str(argument)[:20]}, and may to {most:,}")


def check_replace(text: str, old: Any, new: Any) -> None:
    """As `check_operation`, for `text.replace(old, new)`."""
    if isinstance(old, str) and isinstance(new, str):
        check_size(len(text) + text.count(old) * len(new))


def check_join(between: Any, items: Sequence[Any]) -> None:
    """As `check_operation`, for `between.join(items)`."""
    check_size(weight(items) + len(items) * weight(between))


@cache
def _use_counting_environment() -> None:
    """Have transformers compile templates with the checks in them, from now on in this process."""
    from transformers.utils import chat_template_utils

    from groupwise.templates.counting import CountingEnvironment

    chat_template_utils.ImmutableSandboxedEnvironment = CountingEnvironment
    chat_template_utils._compile_jinja_template.cache_clear()
