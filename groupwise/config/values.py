"""Texts from the command line into values, by the type of the setting that they are for; and values back into text."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping
from typing import Any, get_args, get_origin

from groupwise.config.keys import Key, admits_none, sections_of, without_none


def parse_value(text: str, annotation: Any) -> Any:
    """What `--key text` means for a setting of this type; numbers, booleans and choices are left to the type itself.

    `none` and `null` are None where the type admits it. Lists and tables are JSON or TOML literals; a list may also be
    given as `a,b,c`. A setting that may hold anything takes a literal, or else the text as it is.

    Raises:
        ValueError: a list or a table was expected and the text is neither; the message says what was expected.
    """
    if admits_none(annotation) and text.strip().lower() in ("none", "null"):
        return None
    annotation = without_none(annotation)
    if annotation is Any:
        try:
            return parse_literal(text)
        except ValueError:
            return text
    if get_origin(annotation) is tuple:
        return _parse_list(text, get_args(annotation)[0])
    if get_origin(annotation) is dict or sections_of(annotation):
        if not text.lstrip().startswith("{"):
            raise ValueError('expected a table such as {"key": 1}')
        return parse_literal(text)
    return text


def _parse_list(text: str, item: Any) -> Any:
    if text.lstrip().startswith("["):
        return parse_literal(text)
    if item not in (str, int, float):
        raise ValueError("expected a list of tables such as [{...}, {...}]")
    return [part.strip() for part in text.split(",")] if text.strip() else []


def parse_literal(text: str) -> Any:
    """A JSON or TOML literal.

    Raises:
        ValueError: it is neither.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        document = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        raise ValueError("expected a JSON or TOML literal") from None
    if list(document) != ["value"]:
        raise ValueError("expected one JSON or TOML literal")
    return document["value"]


def literal(value: Any) -> str:
    """The value as a TOML literal; None, which TOML cannot say, is `none`."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_bare(str(key))} = {literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(literal(item) for item in value) + "]"
    if isinstance(value, int | float):
        return repr(value)
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")


def tree_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """`{"optim.lr": 1e-6}` as `{"optim": {"lr": 1e-6}}`; what comes later wins."""
    tree: dict[str, Any] = {}
    for dotted, value in settings.items():
        *around, last = dotted.split(".")
        node = tree
        for part in around:
            node = node.setdefault(part, {})
        node[last] = dict(value) if isinstance(value, Mapping) else value
    return tree


def default_text(key: Key) -> str:
    """The default of a setting; the defaults, where several sections have it and disagree."""
    by_text: dict[str, list[str]] = {}
    for choice, value in key.defaults.items():
        by_text.setdefault(literal(value), []).append(choice)
    if len(by_text) < 2:
        return literal(key.default)
    return ", ".join(f"{text} with {'/'.join(choices)}" for text, choices in by_text.items())


def _bare(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else literal(key)
