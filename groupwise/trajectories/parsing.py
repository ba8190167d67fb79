"""Rows from objects of JSON, of any format that there was; what is damaged is refused."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate
from types import NoneType
from typing import Any

from groupwise.trajectories.fields import Fields, number
from groupwise.trajectories.rows import EvalTrajectoryRow, ImageRow, SegmentRow, TrajectoryRow, Writer, split_credit
from groupwise.trajectories.writing import FORMAT
from groupwise.types import Boundary, FinishReason, RolloutStatus


def from_json(values: Mapping[str, Any]) -> TrajectoryRow:
    """The row of an object of any format that there was.

    Raises:
        ValueError: its format is newer, something is missing or of another kind, or lengths do not agree.
    """
    old, row = _format_of(values) == 1, Fields(values)
    token_ids = tuple(row.list_of("token_ids", int))
    advantage, credit = _old_credit(row, len(token_ids)) if old else _credit(row)
    return TrajectoryRow(
        step=row.get("step", int),
        group=row.get("group", int),
        uid=row.get("uid", str),
        draw=None if old else row.get("draw", int, NoneType),
        sample_index=row.get("sample_index", int),
        data_source=row.get("data_source", str),
        prompt=row.get("prompt", str),
        prompt_tokens=row.size("prompt_tokens"),
        prompt_ids=tuple(row.list_of("prompt_ids", int)) if row.has("prompt_ids") else None,
        segments=_only_segment(row, len(token_ids)) if old else _segments(row),
        token_ids=token_ids,
        logprobs=row.numbers("logprobs"),
        policy_versions=_versions(row, len(token_ids)),
        rewards=row.rewards(),
        reward=row.get("reward", float, int, NoneType),
        advantage=advantage,
        credit=credit,
        scores=_scores(row),
        finish_reason=row.word("finish_reason", FinishReason),
        status=row.word("status", RolloutStatus),
        boundary=row.word("boundary", Boundary) if values.get("boundary") is not None else None,
        cause=row.get("cause", str),
        images=() if old else tuple(_image(Fields(image)) for image in row.list_of("images", dict)),
    )


def _credit(row: Fields) -> tuple[float, tuple[float, ...] | None]:
    advantage = number(row.get("advantage", float, int, NoneType))
    return advantage, row.numbers("credit") if row.has("credit") else None


def _old_credit(row: Fields, num_tokens: int) -> tuple[float, tuple[float, ...] | None]:
    """Format 1: one advantage, or a list of the tokens' own."""
    if not isinstance(row.get("advantage", float, int, NoneType, list), list):
        return _credit(row)
    given = row.numbers("advantage")
    if len(given) != num_tokens:
        raise ValueError(
            f'got "advantage" of {len(given)} values; expected one, or one for each of {num_tokens} tokens'
        )
    try:
        return split_credit(given)
    except OverflowError:
        raise ValueError('got "advantage" with numbers too large to add') from None


def _only_segment(row: Fields, num_tokens: int) -> tuple[SegmentRow, ...]:
    """Format 1: everything after the prompt is one turn."""
    reason = row.word("finish_reason", FinishReason)
    return (SegmentRow("model", row.get("completion", str), num_tokens, finish_reason=reason),)


def _segments(row: Fields) -> tuple[SegmentRow, ...]:
    text, found = row.get("completion", str), [Fields(values) for values in row.list_of("segments", dict)]
    ends = list(accumulate((segment.size("chars") for segment in found), initial=0))
    if ends[-1] != len(text):
        raise ValueError(f"its segments have {ends[-1]} characters, and its completion {len(text)}")
    return tuple(_segment(each, text[ends[i] : ends[i + 1]]) for i, each in enumerate(found))


def _segment(segment: Fields, text: str) -> SegmentRow:
    ended = segment.row.get("finish_reason") is not None
    return SegmentRow(
        by=segment.word("by", Writer),
        text=text,
        num_tokens=segment.size("tokens"),
        finish_reason=segment.word("finish_reason", FinishReason) if ended else None,
        reward=segment.get("reward", float, int, NoneType) if segment.has("reward") else None,
        messages=tuple(segment.list_of("messages", dict)) if segment.has("messages") else (),
    )


def _image(image: Fields) -> ImageRow:
    return ImageRow(
        digest=image.get("digest", str),
        width=image.size("width"),
        height=image.size("height"),
        tokens=image.size("tokens"),
        thumbnail=image.get("thumbnail", str, NoneType),
    )


def _versions(row: Fields, num_tokens: int) -> tuple[int, ...]:
    """`[T]`: runs where they vary, else the one of all tokens."""
    if row.has("policy_versions"):
        runs = row.list_of("policy_versions", list)
        if any(list(map(type, run)) != [int, int] for run in runs) or sum(run[1] for run in runs) != num_tokens:
            raise ValueError(f'got "policy_versions" that are no runs [version, tokens] of {num_tokens} tokens')
        return tuple(version for version, count in runs for _ in range(count))
    return (row.get("policy_version", int),) * num_tokens if num_tokens else ()


def _scores(row: Fields) -> dict[str, tuple[float, ...]]:
    if not row.has("scores"):
        return {}
    scores = Fields(row.get("scores", dict))
    return {name: scores.numbers(name) for name in scores.row}


def eval_from_json(values: Mapping[str, Any]) -> EvalTrajectoryRow:
    """The row of an object, as `from_json`."""
    _format_of(values)
    row = Fields(values)
    return EvalTrajectoryRow(
        uid=row.get("uid", str),
        sample_index=row.get("sample_index", int),
        data_source=row.get("data_source", str),
        prompt=row.get("prompt", str),
        text=row.get("text", str),
        rewards=row.rewards(),
        reward=row.get("reward", float, int, NoneType),
        correct=row.get("correct", bool),
        num_tokens=row.size("num_tokens"),
        finish_reason=row.word("finish_reason", FinishReason),
        status=row.word("status", RolloutStatus),
        cause=row.get("cause", str),
        policy_version=row.get("policy_version", int),
    )


def _format_of(values: Mapping[str, Any]) -> int:
    number = values.get("format", 1)
    if type(number) is not int or number < 1:
        raise ValueError(f"got the format {number!r}; expected a whole number from 1 to {FORMAT}")
    if number > FORMAT:
        raise ValueError(
            f"got format {number}; this version of groupwise knows formats up to {FORMAT}: install the one that wrote "
            "it (the run's versions.json names it), or a newer one"
        )
    return number
