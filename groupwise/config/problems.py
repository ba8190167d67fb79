"""What is wrong with given values, in the user's words: dotted name, origin, what was got, what was expected."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from groupwise.config.base import REFUSED
from groupwise.config.keys import annotation_of, describe_type, item_section, name_of, nearest_key, without_none
from groupwise.config.values import literal
from groupwise.errors import nearest

_QUOTE = "'"  # pydantic names a key in quotes


@dataclass(frozen=True, slots=True)
class Problem:
    """One wrong value or name.

    Example:
        >>> print(Problem("optim.lr", "recipe.toml", "got -1; expected a number above 0"))
        optim.lr (recipe.toml): got -1; expected a number above 0
    """

    name: str
    origin: str
    text: str

    def __str__(self) -> str:
        return f"{self.name} ({self.origin}): {self.text}" if self.name else self.text


def problems_of(
    error: ValidationError | None, values: Mapping[str, Any], origin_of: Callable[[str], str]
) -> Iterator[Problem]:
    """Everything wrong with the values: what pydantic found, and what it lets through but a run cannot use."""
    reported: set[str] = set()
    for detail in error.errors() if error else ():
        problem = _translate(detail, origin_of)
        reported.add(problem.name)
        yield problem
    for dotted, text in _unusable(values, ""):
        if dotted not in reported:
            yield Problem(dotted, origin_of(dotted), text)


def _unusable(value: Any, dotted: str) -> Iterator[tuple[str, str]]:
    """Names and remarks: NaN and infinities, `true` where a number belongs, and text that is not valid Unicode."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _unusable(item, f"{dotted}.{key}" if dotted else str(key))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _unusable(item, f"{dotted}.{index}")
    elif isinstance(value, bool):
        if without_none(annotation_of(dotted)) in (int, float):
            yield dotted, f"got {literal(value)}; expected {in_words(annotation_of(dotted))}"
    elif isinstance(value, float) and not math.isfinite(value):
        yield dotted, f"got {value}; expected a finite number"
    elif isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
        yield dotted, f"got {value!a}; expected text that is valid UTF-8"


def _translate(detail: ErrorDetails, origin_of: Callable[[str], str]) -> Problem:
    dotted = name_of(detail["loc"])
    kind, got, limits = detail["type"], detail["input"], detail.get("ctx", {})
    if kind == REFUSED:
        dotted = f"{dotted}.{limits['key']}"
        return Problem(dotted, origin_of(dotted), limits["text"])
    if kind == "union_tag_invalid":
        dotted = f"{dotted}.{limits['discriminator'].strip(_QUOTE)}"
        hint = nearest(str(limits["tag"]), _choices(annotation_of(dotted)), " (did you mean '{}'?)")
        expected = f"one of {limits['expected_tags']}{hint}"
        return Problem(dotted, origin_of(dotted), f"got {shortened(limits['tag'])}; expected {expected}")
    if kind == "value_error":
        return Problem(dotted, origin_of(dotted), detail["msg"].removeprefix("Value error, "))
    if kind == "extra_forbidden":
        return Problem(dotted, origin_of(dotted), f"there is no such setting; {nearest_key(dotted)}")
    if kind == "missing" and dotted.rpartition(".")[2].isdecimal():
        dotted = dotted.rpartition(".")[0]
    elif kind == "missing":
        return Problem(dotted, origin_of(dotted.rpartition(".")[0]), "it has no default; give it a value")
    return Problem(dotted, origin_of(dotted), f"got {shortened(got)}; expected {_expected(detail, dotted)}")


def _expected(detail: ErrorDetails, dotted: str) -> str:
    limits = detail.get("ctx", {})
    bounds = {
        "greater_than": "a number above {gt}",
        "greater_than_equal": "at least {ge}",
        "less_than": "a number below {lt}",
        "less_than_equal": "at most {le}",
        "finite_number": "a finite number",
        "model_type": "a table with the section's keys",
        "model_attributes_type": "a table with the section's keys",
    }
    kind, annotation = detail["type"], _annotation(dotted)
    if kind in bounds:
        return bounds[kind].format(**limits)
    if kind == "literal_error":
        return limits["expected"] + nearest(str(detail["input"]), _choices(annotation), " (did you mean '{}'?)")
    if item_section(annotation):
        return f"a list of tables, each under [[{dotted}]]"
    return in_words(annotation) if annotation is not None else detail["msg"].removeprefix("Input should be ")


def _choices(annotation: Any) -> list[str]:
    """Of a literal, or of several."""
    if get_origin(annotation) is Literal:
        return [str(choice) for choice in get_args(annotation)]
    return [choice for part in get_args(annotation) for choice in _choices(part)]


def _annotation(dotted: str) -> Any | None:
    """The type of a setting, or of one entry of a list setting."""
    parent, _, last = dotted.rpartition(".")
    around = without_none(annotation_of(parent)) if last.isdecimal() else None
    return get_args(around)[0] if get_origin(around) is tuple else annotation_of(dotted)


def in_words(annotation: Any) -> str:
    text = describe_type(annotation)
    return f"a {text}" if text.startswith(("whole", "number", "list", "table")) else text


def shortened(value: Any, width: int = 120) -> str:
    text = literal(value)
    return text if len(text) <= width else f"{text[:width]}… ({len(text)} characters)"
