"""Rows as objects of JSON, in the newest format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import NoneType
from typing import Any

from groupwise.texts import encodable
from groupwise.trajectories.rows import EvalTrajectoryRow, ImageRow, SegmentRow, TrajectoryRow

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
        "segments": [_segment_json(segment) for segment in row.segments],
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
        "images": [_image_json(image) for image in row.images],
        "token_ids": list(row.token_ids),
        "logprobs": list(row.logprobs),
    }
    if row.prompt_ids is not None:
        values["prompt_ids"] = list(row.prompt_ids)
    if row.policy_versions.count(row.policy_version) < len(row.policy_versions):
        values["policy_versions"] = _runs(row.policy_versions)
    if row.credit is not None:
        values["credit"] = list(row.credit)
    if row.scores:
        values["scores"] = {name: list(logprobs) for name, logprobs in row.scores.items()}
    return values


def _segment_json(segment: SegmentRow) -> dict[str, Any]:
    values: dict[str, Any] = {"by": segment.by, "tokens": segment.num_tokens, "chars": len(encodable(segment.text))}
    if segment.finish_reason is not None:
        values["finish_reason"] = segment.finish_reason
    if segment.reward is not None:
        values["reward"] = segment.reward
    if segment.messages:
        values["messages"] = [_plain(message) for message in segment.messages]
    return values


def _image_json(image: ImageRow) -> dict[str, Any]:
    return {
        "digest": image.digest,
        "width": image.width,
        "height": image.height,
        "tokens": image.tokens,
        "thumbnail": image.thumbnail,
    }


def _plain(value: Any) -> Any:
    """An environment's message as JSON; of what JSON has no word for, the kind, never an address in memory."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | NoneType) else f"<{type(value).__name__}>"


def _runs(values: Sequence[int]) -> list[list[int]]:
    """`[value, count]` of each stretch of equal ones."""
    runs: list[list[int]] = []
    for value in values:
        if runs and runs[-1][0] == value:
            runs[-1][1] += 1
        else:
            runs.append([value, 1])
    return runs


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
