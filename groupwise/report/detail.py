"""A group as the page shows it: its prompt, and each sample with what every token read as and was worth."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from groupwise.report.pieces import Pieces
from groupwise.report.rows import GroupEntry, RolloutIndex
from groupwise.trajectories.parsing import from_json
from groupwise.trajectories.rows import SegmentRow, TrajectoryRow

DIGITS = 5
"""Of a token's numbers; the run's own files have all."""


def group_detail(index: RolloutIndex, entry: GroupEntry, pieces: Pieces) -> dict[str, Any]:
    """JSON-ready. A row that cannot be read as one says why instead."""
    samples: list[dict[str, Any]] = []
    for values in index.read(entry):
        try:
            samples.append(_sample(from_json(values), pieces))
        except ValueError as error:
            samples.append({"index": values.get("sample_index"), "problem": str(error)})
    return {
        "step": entry.step,
        "group": entry.group,
        "uid": entry.uid,
        "draw": entry.draw,
        "source": entry.source,
        "prompt": index.prompts[entry.prompt],
        "samples": samples,
    }


def _sample(row: TrajectoryRow, pieces: Pieces) -> dict[str, Any]:
    texts = pieces.of(row.token_ids)
    versions = set(row.policy_versions)
    return {
        "index": row.sample_index,
        "text": row.completion,
        "pieces": texts,
        "ids": list(row.token_ids),
        "logprobs": rounded(row.logprobs),
        "credit": None if row.credit is None else rounded(row.credit),
        "scores": {name: rounded(values) for name, values in row.scores.items()},
        "advantage": row.advantage,
        "reward": row.reward,
        "rewards": dict(row.rewards),
        "finish": row.finish_reason,
        "status": row.status,
        "boundary": row.boundary,
        "cause": row.cause,
        "prompt_tokens": row.prompt_tokens,
        "tokens": row.completion_tokens,
        "versions": list(row.policy_versions) if len(versions) > 1 else sorted(versions),
        "segments": [_segment(segment) for segment in row.segments],
        "images": [f"{image.width} × {image.height}, {image.tokens} tokens" for image in row.images],
    }


def _segment(segment: SegmentRow) -> dict[str, Any]:
    return {
        "by": segment.by,
        "tokens": segment.num_tokens,
        "chars": len(segment.text.encode("utf-16-le", "surrogatepass")) // 2,  # as a page counts
        "reward": segment.reward,
        "finish": segment.finish_reason,
        "messages": [_message(message) for message in segment.messages],
    }


def _message(message: Mapping[str, Any]) -> dict[str, str]:
    return {"role": str(message.get("role", "")), "content": str(message.get("content", ""))}


def rounded(values: Iterable[float]) -> list[float]:
    """To `DIGITS` digits."""
    return [float(f"{value:.{DIGITS}g}") for value in values]
