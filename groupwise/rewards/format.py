"""Format rewards: does the completion have the wanted shape?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import regex

from groupwise.errors import ConfigError
from groupwise.rewards.arguments import finite_number, must_differ, text
from groupwise.rewards.texts import RewardCompletion, completion_texts

GSM8K_PATTERN = r"(?s:.*)#### -?[0-9][0-9,]*(?:\.[0-9]+)?\s*"
"""Any text whose last line ends with `#### <number>`."""

OPEN, CLOSE = "<think>", "</think>"

_SECONDS_PER_COMPLETION = 5.0


def format_reward(
    *, pattern: str = GSM8K_PATTERN, score: float = 1.0, miss_score: float = 0.0
) -> Callable[..., list[float | None]]:
    """Make a reward for completions that a regular expression matches from their first to their last character.

    The match runs without the interpreter's lock and ends after 5 seconds, so a pattern that backtracks without end
    fails the call and holds up nothing else.

    Args:
        pattern: syntax of the `regex` package, which contains that of `re`; `(?s)` lets `.` match line breaks.
        score: for a completion that matches.
        miss_score: for one that does not.

    Raises:
        ConfigError: an argument is wrong.
    """
    try:
        compiled = regex.compile(text(pattern, reward="format", name="pattern"))
    except regex.error as error:
        raise ConfigError(
            f"reward 'format': pattern = {pattern!r} is not a regular expression: {error}; in TOML, write it in single "
            "quotes so that backslashes stay"
        ) from error
    hit = finite_number(score, reward="format", name="score")
    miss = finite_number(miss_score, reward="format", name="miss_score")
    must_differ("format", score=hit, miss_score=miss)

    def matches_pattern(completions: Sequence[RewardCompletion], **_: Any) -> list[float | None]:
        rewards: list[float | None] = []
        for completion in completion_texts(completions):
            try:
                match = compiled.fullmatch(completion, timeout=_SECONDS_PER_COMPLETION, concurrent=True)
            except TimeoutError:
                raise TimeoutError(
                    f"pattern {pattern!r} did not finish within {_SECONDS_PER_COMPLETION:g} s on a text of "
                    f"{len(completion)} characters; remove nested repetitions such as (a+)+"
                ) from None
            rewards.append(hit if match else miss)
        return rewards

    return matches_pattern


def think_format_reward(*, score: float = 1.0, miss_score: float = 0.0) -> Callable[..., list[float | None]]:
    """Make a reward for completions that think once, first, between `<think>` and `</think>`, and then answer.

    Where the prompt ends with `<think>`, as many chat templates have it, the completion begins inside its thoughts.

    Args:
        score: for a completion in this format.
        miss_score: for any other.

    Raises:
        ConfigError: an argument is wrong.
    """
    hit = finite_number(score, reward="think_format", name="score")
    miss = finite_number(miss_score, reward="think_format", name="miss_score")
    must_differ("think_format", score=hit, miss_score=miss)

    def think_format(
        completions: Sequence[RewardCompletion], rendered_prompts: Sequence[str] = (), **_: Any
    ) -> list[float | None]:
        begun = [OPEN if thoughts_are(prompt) == "open" else "" for prompt in rendered_prompts]
        texts = completion_texts(completions)
        return [
            hit if _thinks_then_answers(beginning + text) else miss
            for beginning, text in zip(begun or [""] * len(texts), texts, strict=True)
        ]

    return think_format


def thoughts_are(prompt: str) -> Literal["open", "closed", "none"]:
    """What the end of a rendered prompt says of the answer's thoughts: begun, over already, or nothing."""
    end = prompt.rstrip()
    return "open" if end.endswith(OPEN) else "closed" if end.endswith(CLOSE) else "none"


def _thinks_then_answers(completion: str) -> bool:
    if completion.count(OPEN) != 1 or completion.count(CLOSE) != 1:
        return False
    thought, _, answer = completion.partition(CLOSE)
    return thought.lstrip().startswith(OPEN) and bool(answer.strip())
