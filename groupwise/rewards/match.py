"""Exact match of the whole completion with a column."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from groupwise.errors import ConfigError
from groupwise.rewards.arguments import finite_number, flag, must_differ, text
from groupwise.rewards.texts import RewardCompletion, completion_texts


def exact_match_reward(
    *, column: str = "answer", ignore_case: bool = False, score: float = 1.0
) -> Callable[..., list[float | None]]:
    """Make a reward for completions that equal the row's `column`, apart from space at both ends; others get 0.

    Args:
        column: holds the expected text or number; where it is null, the completion gets no reward.
        ignore_case: compare without regard to case.
        score: for an equal completion.

    Raises:
        ConfigError: an argument is wrong.
    """
    wanted = text(column, reward="exact_match", name="column")
    fold = flag(ignore_case, reward="exact_match", name="ignore_case")
    right = finite_number(score, reward="exact_match", name="score")
    must_differ("exact_match", 0.0, score=right)

    def normalised(value: Any) -> str:
        stripped = str(value).strip()
        return stripped.casefold() if fold else stripped

    def exact_match(completions: Sequence[RewardCompletion], **columns: Sequence[Any]) -> list[float | None]:
        _require(columns, wanted)
        rewards: list[float | None] = []
        for completion, truth in zip(completion_texts(completions), columns[wanted], strict=True):
            rewards.append(None if truth is None else right * (normalised(completion) == normalised(truth)))
        return rewards

    return exact_match


def exact_match_row_check(*, column: str = "answer", **_: Any) -> Callable[[Mapping[str, Any]], None]:
    """A check that a row has the column."""

    def check(row: Mapping[str, Any]) -> None:
        _require(row, column)

    return check


def _require(columns: Mapping[str, Any], wanted: str) -> None:
    if wanted not in columns:
        present = ", ".join(sorted(columns)) or "none"
        raise ConfigError(
            f"reward 'exact_match' needs the column {wanted!r}; the row has: {present}. Set data.answer_column, or the "
            "reward's args.column, to the column that holds the expected text"
        )
