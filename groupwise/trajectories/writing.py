"""Rows as objects of JSON, in the newest format. A run makes its own of these parts, in `groupwise.rollout.records`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from types import NoneType
from typing import Any

from groupwise.texts import encodable
from groupwise.trajectories.rows import EvalTrajectoryRow, SegmentRow, TrajectoryRow
from groupwise.types import Segment

FORMAT = 2


def to_json(row: TrajectoryRow) -> dict[str, Any]:
    """The row's object, in the newest format; `groupwise.files.json_line` makes a line of it."""
    values = {
        "format": FORMAT,
        "step": row.step,
        "group": row.group,
        "uid": row.uid,
        "draw": row.draw,
        "sample_index": row.sample_index,
        "data_source": row.data_source,
        "prompt": row.prompt,
        "completion": row.completion,
        "segments": [segment_json(each, each.num_tokens) for each in row.segments],
        "reward": row.reward,
        "rewards": dict(row.rewards),
        "advantage": row.advantage,
        "prompt_tokens": row.prompt_tokens,
        "completion_tokens": row.completion_tokens,
        "finish_reason": row.finish_reason,
        "policy_version": row.policy_version,
        "status": row.status,
        "boundary": row.boundary,
        "cause": row.cause,
        "images": [asdict(image) for image in row.images],
        "token_ids": list(row.token_ids),
        "logprobs": list(row.logprobs),
    }
    if row.prompt_ids is not None:
        values["prompt_ids"] = list(row.prompt_ids)
    if len(set(row.policy_versions)) > 1:
        values["policy_versions"] = runs(row.policy_versions)
    if row.credit is not None:
        values["credit"] = list(row.credit)
    if row.scores:
        values["scores"] = {name: list(logprobs) for name, logprobs in row.scores.items()}
    return values


def segment_json(segment: Segment | SegmentRow, num_tokens: int) -> dict[str, Any]:
    """A part of a row's `segments`; its text and its tokens are in the row."""
    values: dict[str, Any] = {"by": segment.by, "tokens": num_tokens, "chars": len(encodable(segment.text))}
    if segment.finish_reason is not None:
        values["finish_reason"] = segment.finish_reason
    if segment.reward is not None:
        values["reward"] = segment.reward
    if segment.messages:
        values["messages"] = [_plain(message) for message in segment.messages]
    return values


def _plain(value: Any) -> Any:
    """An environment's message as JSON; of what JSON has no word for, the kind, never an address in memory."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | NoneType) else f"<{type(value).__name__}>"


def runs(values: Sequence[int]) -> list[list[int]]:
    """`[value, count]` of each stretch of equal ones."""
    found: list[list[int]] = []
    for value in values:
        if found and found[-1][0] == value:
            found[-1][1] += 1
        else:
            found.append([value, 1])
    return found


def eval_to_json(row: EvalTrajectoryRow) -> dict[str, Any]:
    """The row's object, as `to_json`."""
    return {
        "format": FORMAT,
        "uid": row.uid,
        "sample_index": row.sample_index,
        "data_source": row.data_source,
        "prompt": row.prompt,
        "text": row.text,
        "rewards": dict(row.rewards),
        "reward": row.reward,
        "correct": row.correct,
        "num_tokens": row.num_tokens,
        "finish_reason": row.finish_reason,
        "status": row.status,
        "cause": row.cause,
        "policy_version": row.policy_version,
    }
