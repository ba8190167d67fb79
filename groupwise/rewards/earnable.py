"""Whether a built-in reward can be earned at all, with this template, these rows and these stop strings.

One that cannot gives every answer of the whole run the same, so it is refused before a model is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from groupwise.errors import ConfigError, DataError
from groupwise.protocols import Tokenizer
from groupwise.rewards.format import CLOSE, GSM8K_PATTERN, OPEN, thoughts_are
from groupwise.rewards.gsm8k import MARKER
from groupwise.types import Prompt

PromptCheck: TypeAlias = Callable[[Prompt, Sequence[str]], None]
"""Raises ConfigError or DataError where no answer to the prompt, under these stop strings, can earn the reward."""

_BEFORE_A_THOUGHT = re.compile(r"(?:\^|\\A|\(\?[a-zA-Z]+\)|\\s[*+]|\(\?:|\()*<think>")


def gsm8k_marks(*, mode: str = "flexible", **_: Any) -> tuple[str, ...]:
    """What every answer that earns it has, with more text after it."""
    return (f"{MARKER} ",) if mode == "strict" else (MARKER,)


def format_marks(*, pattern: str = GSM8K_PATTERN, **_: Any) -> tuple[str, ...]:
    return (f"{MARKER} ",) if pattern == GSM8K_PATTERN else ()


def think_marks(**_: Any) -> tuple[str, ...]:
    return (CLOSE,)


def check_marks(name: str, marks: Sequence[str], stop: Sequence[str]) -> None:
    """Refuse a stop string that ends each answer where the reward's mark begins.

    Raises:
        ConfigError: naming reward, mark and stop string.
    """
    for mark in marks:
        for end in stop:
            if end in mark:
                raise ConfigError(
                    f"reward {name!r} cannot be earned: an answer needs text after {mark!r}, and the stop string "
                    f"{end!r} (rollout.stop) ends it there; remove that stop string, or the reward"
                )


def check_tokens(name: str, marks: Sequence[str], tokenizer: Tokenizer) -> None:
    """Refuse a tokenizer in whose texts the reward's mark never appears.

    Raises:
        ConfigError: the mark is a special token, which texts leave out, or has no tokens.
    """
    for mark in (mark.strip() for mark in marks):
        token_ids = tokenizer.encode(mark, add_special_tokens=False)
        if mark not in tokenizer.decode(token_ids, skip_special_tokens=True):
            raise ConfigError(
                f"reward {name!r} cannot be earned: it looks for {mark!r}, and this tokenizer leaves that out of texts "
                "(it is a special token there, or has no token); take another reward, or a pattern of your own"
            )


def think_prompt_check(**_: Any) -> PromptCheck:
    def check(prompt: Prompt, stop: Sequence[str]) -> None:
        thoughts = thoughts_are(prompt.text)
        if thoughts == "closed":
            raise ConfigError(
                f"reward 'think_format' cannot be earned: the prompt ends with {prompt.text[-20:]!r}, so thoughts are "
                "over before the answer begins; let the template think (data.chat_template_kwargs.enable_thinking = "
                "true, where it has that), or remove the reward"
            )
        if thoughts == "none":
            check_marks("think_format", (OPEN,), stop)

    return check


def format_prompt_check(*, pattern: str = GSM8K_PATTERN, **_: Any) -> PromptCheck:
    opens = _BEFORE_A_THOUGHT.match(pattern) is not None

    def check(prompt: Prompt, stop: Sequence[str]) -> None:
        if opens and thoughts_are(prompt.text) == "open":
            raise ConfigError(
                f"reward 'format' cannot be earned: pattern = {pattern!r} begins with '<think>', which the prompt has "
                f"written already (it ends with {prompt.text[-20:]!r}); take '<think>' out of the pattern"
            )

    return check


def exact_match_prompt_check(*, column: str = "answer", **_: Any) -> PromptCheck:
    def check(prompt: Prompt, stop: Sequence[str]) -> None:
        value = _reference(prompt.columns, column)
        if value is None:
            return
        if not value:
            raise DataError(
                f"reward 'exact_match': the column {column!r} is blank, and only a blank answer would equal it; write "
                "the expected text, or null for a row without this reward"
            )
        for end in stop:
            if 0 <= value.find(end) < len(value) - len(end):
                raise DataError(
                    f"reward 'exact_match': no answer can be {value[:40]!r}, since the stop string {end!r} "
                    "(rollout.stop) ends it before; remove that stop string, or change the row"
                )

    return check


def _reference(columns: Mapping[str, Any], column: str) -> str | None:
    value = columns.get(column)
    return None if value is None else str(value).strip()
