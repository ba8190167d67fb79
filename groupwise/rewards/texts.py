"""The text of completions, in whichever of the two shapes rewards get them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

RewardCompletion: TypeAlias = str | Sequence[Mapping[str, Any]]
"""Plain text, or a conversation whose last message is the completion."""


def completion_texts(completions: Sequence[RewardCompletion]) -> list[str]:
    """The generated text of each completion, `[G]`.

    Example:
        >>> completion_texts(["4", [{"role": "assistant", "content": "5"}]])
        ['4', '5']
    """
    return [completion if isinstance(completion, str) else _last_content(completion) for completion in completions]


def _last_content(messages: Sequence[Mapping[str, Any]]) -> str:
    return str(messages[-1].get("content") or "") if messages else ""
