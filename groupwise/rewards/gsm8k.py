"""The GSM8K judger: is the number after `####` the reference answer?

`mode = "flexible"`, the default, compares numbers as numbers. `mode = "strict"` is the rule of XTuner's GSM8K judger,
for runs that should be comparable with it: it takes the last `#### <number>` of the last 300 characters and compares
strings, so `#### 72.` and `#### $72` do not match 72.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from numbers import Number
from typing import Any

from groupwise.errors import ConfigError, DataError
from groupwise.rewards.arguments import finite_number, must_differ
from groupwise.rewards.final_number import read_number
from groupwise.rewards.signature import STANDARD_ARGUMENTS
from groupwise.rewards.texts import RewardCompletion, completion_texts

MARKER = "####"
TRUTH_COLUMNS = ("reward_model", "answer", "solution", "ground_truth")

_STRICT_WINDOW = 300
_STRICT_ANSWER = re.compile(r"#### (\-?[0-9\.\,]+)")


def gsm8k_reward(
    *, mode: str = "flexible", score: float = 1.0, format_score: float = 0.0
) -> Callable[..., list[float | None]]:
    """Make the judger.

    Args:
        mode: `flexible` or `strict`.
        score: for the right answer.
        format_score: for a wrong answer in the right format; a completion without an answer after `####` gets 0.

    Raises:
        ConfigError: an argument is wrong.
    """
    if mode not in ("flexible", "strict"):
        raise ConfigError(f"reward 'gsm8k': mode = {mode!r} is unknown; expected 'flexible' or 'strict'")
    judge = judge_flexible if mode == "flexible" else judge_strict
    right = finite_number(score, reward="gsm8k", name="score")
    wrong = finite_number(format_score, reward="gsm8k", name="format_score")
    must_differ("gsm8k", 0.0, score=right, format_score=wrong)

    def gsm8k(completions: Sequence[RewardCompletion], **columns: Sequence[Any]) -> list[float | None]:
        rewards: list[float | None] = []
        for index, text in enumerate(completion_texts(completions)):
            truth = ground_truth({name: columns[name][index] for name in columns if name not in STANDARD_ARGUMENTS})
            verdict = judge(text, truth)
            rewards.append(0.0 if verdict is None else right if verdict else wrong)
        return rewards

    return gsm8k


def gsm8k_row_check(*, mode: str = "flexible", **_: Any) -> Callable[[Mapping[str, Any]], None]:
    """A check that a row's reference answer is one that this mode can compare with."""

    def check(row: Mapping[str, Any]) -> None:
        truth = ground_truth(row)
        if mode == "flexible":
            _truth_number(truth)

    return check


def ground_truth(row: Mapping[str, Any]) -> str:
    """The reference answer of a row: `reward_model.ground_truth`, else `answer`, `solution` or `ground_truth`.

    Of a worked GSM8K answer, the part after the last `####`. Commas go, except from `reward_model.ground_truth`, which
    the strict rule compares as it is.

    Raises:
        ConfigError: the row has none of these columns.
        DataError: it has one, and there is no answer in it.
    """
    present = [name for name in TRUTH_COLUMNS if name in row]
    for name in present:
        value = row[name]
        if name == "reward_model":
            value = value.get("ground_truth") if isinstance(value, Mapping) else None
        truth = _truth_text(value)
        if truth:
            return truth if name == "reward_model" else truth.strip().replace(",", "")
    if present:
        shown = ", ".join(f"{name} = {str(row[name])[:80]!r}" for name in present)
        raise DataError(
            f"reward 'gsm8k' finds no reference answer in {shown}; expected a number or text with '#### 72'"
        )
    columns = ", ".join(sorted(row)) or "no column"
    raise ConfigError(
        "reward 'gsm8k' needs a reference answer: a column reward_model with ground_truth in it, or a column answer, "
        f"solution or ground_truth; the row has: {columns}. Set data.answer_column to the column that holds it"
    )


def judge_strict(text: str, truth: str) -> bool | None:
    """XTuner's rule: True right, False wrong, None when there is no `#### <number>` in the last 300 characters."""
    answers = _STRICT_ANSWER.findall(text[-_STRICT_WINDOW:])
    return answers[-1].replace(",", "") == truth if answers else None


def judge_flexible(text: str, truth: str) -> bool | None:
    """True when the number after the last `####` equals the truth, False when not, None when there is no number.

    Raises:
        DataError: the truth is not a number.
    """
    expected = _truth_number(truth)
    if MARKER not in text:
        return None
    number = read_number(text.rsplit(MARKER, 1)[1])
    return None if number is None else number == expected


def _truth_text(value: Any) -> str:
    if not isinstance(value, str | Number) or isinstance(value, bool):
        return ""
    if isinstance(value, float) and not math.isfinite(value):
        return ""
    text = str(value)
    if MARKER in text:
        return text.rsplit(MARKER, 1)[1].strip().replace(",", "")
    return text


def _truth_number(truth: str) -> Decimal:
    number = read_number(truth)
    if number is None:
        raise DataError(
            f"reward 'gsm8k' got the reference answer {truth[:80]!r}, which is not one number; correct the row, or use "
            "the reward 'exact_match' for answers that are text"
        )
    return number
