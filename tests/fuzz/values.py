"""Values that programs stumble over, as hypothesis strategies, and ways to damage what was right."""

from __future__ import annotations

import copy
from typing import Any

from hypothesis import strategies as st

ODD_TEXTS = (
    *("", " ", "\n", "\x00", "\x1b[2J", "﻿", "é", "日本", "🙂", "a" * 5000, "../..", "/dev/null", "~", "-", "--", "%s"),
    *("{}", "{{", "{% for %}", "\\", '"', "'", "true", "null", "nan", "1e400", "\u202e", "os:system", "none", "auto"),
    *(
        "a:b",
        ":",
        "reward.py",
        "reward.py:",
        "reward.py:nope",
        "con",
        "a/b",
        "hf_" + "a" * 34,
        "\ud800",
        "\x7f",
        "0x10",
    ),
)
ODD_NUMBERS = (
    0,
    1,
    -1,
    2,
    3,
    7,
    1.5,
    -0.0,
    10**12,
    -(10**12),
    2**63,
    2**64,
    10**30,
    1e308,
    1e-320,
    float("inf"),
    float("nan"),
)
texts = st.one_of(st.sampled_from(ODD_TEXTS), st.text(max_size=12))
plain_texts = texts.filter(lambda text: not any("\ud800" <= c <= "\udfff" for c in text))
scalars = st.one_of(st.none(), st.booleans(), st.sampled_from(ODD_NUMBERS), st.integers(-3, 40), texts)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=3)),
    max_leaves=6,
)


@st.composite
def damaged_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """The bytes cut short, with some replaced, doubled or put in."""
    way = draw(st.sampled_from(["cut", "flip", "insert", "remove", "double", "empty", "noise"]))
    if not content or way == "empty":
        return b""
    place = draw(st.integers(0, len(content) - 1))
    end = min(len(content), place + draw(st.integers(1, 64)))
    if way == "cut":
        return content[:place]
    if way == "flip":
        return (
            content[:place]
            + bytes(byte ^ draw(st.integers(1, 255)) for byte in content[place : place + 3])
            + content[place + 3 :]
        )
    if way == "insert":
        return content[:place] + draw(st.binary(min_size=1, max_size=16)) + content[place:]
    if way == "remove":
        return content[:place] + content[end:]
    if way == "double":
        return content + content[place:]
    return draw(st.binary(max_size=200))


@st.composite
def damaged_json(draw: st.DrawFn, content: Any) -> Any:
    """The object with one to three of its values replaced, removed, nested or joined by strangers."""
    changed = copy.deepcopy(content)
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(changed))
        if not places:
            return draw(values)
        holder, key = draw(st.sampled_from(places))
        way = draw(st.sampled_from(["replace", "replace", "replace", "remove", "wrap", "text", "scale", "stranger"]))
        old = holder[key]
        if way == "remove":
            del holder[key]
        elif way == "wrap":
            holder[key] = [old]
        elif way == "text":
            holder[key] = str(old)
        elif way == "scale" and isinstance(old, int | float):
            holder[key] = old * draw(st.sampled_from([-1, 0, 1000, 10**9, 0.5]))
        elif way == "stranger" and isinstance(holder, dict):
            holder[draw(texts)] = draw(values)
        else:
            holder[key] = draw(values)
    return changed


def _places(value: Any, depth: int = 0) -> list[tuple[Any, Any]]:
    if depth > 4:
        return []
    found: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        for key in list(value)[:60]:
            found += [(value, key), *_places(value[key], depth + 1)]
    elif isinstance(value, list):
        for key in range(min(4, len(value))):
            found += [(value, key), *_places(value[key], depth + 1)]
    return found
