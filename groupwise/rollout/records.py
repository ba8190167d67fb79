"""What a run keeps of its samples: trajectories for people, ledger rows for proof."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from groupwise.batches import Credit, TrainingBatch
from groupwise.inputs import ImagePiece
from groupwise.trajectories import FORMAT, ImageRow, split_credit
from groupwise.trajectories.writing import runs, segment_json
from groupwise.types import Rollout, RolloutGroup


def trajectory_rows(batch: TrainingBatch, *, step: int) -> Iterator[dict[str, Any]]:
    """One object of JSON per rollout, those of dropped groups last, with a credit of 0.

    Each is what `groupwise.trajectories.to_json` makes of its `TrajectoryRow`, which is not made: that is half the time
    of a step's rows.
    """
    without = [(0.0,) * len(group.rollouts) for group in batch.dropped]
    for group, credit in zip((*batch.groups, *batch.dropped), (*batch.credit, *without), strict=True):
        for rollout, given in zip(group.rollouts, credit, strict=True):
            yield _trajectory_row(group, rollout, given, step=step)


def _trajectory_row(group: RolloutGroup, rollout: Rollout, given: Credit, *, step: int) -> dict[str, Any]:
    prompt, versions, segments = rollout.prompt or group.prompt.input, rollout.policy_versions, rollout.segments
    mean, credit = split_credit(given)
    if credit is not None and len(credit) != len(rollout.token_ids):
        raise ValueError(f"credit for {len(credit)} tokens; expected one value for each of {len(rollout.token_ids)}")
    values: dict[str, Any] = {
        "format": FORMAT,
        "step": step,
        "group": group.index,
        "uid": group.prompt.uid,
        "draw": rollout.key.draw,
        "sample_index": rollout.key.sample_index,
        "data_source": group.prompt.data_source,
        "prompt": group.prompt.text,
        "completion": rollout.text,
        "segments": [segment_json(segment, len(segment.token_ids)) for segment in segments],
        "reward": rollout.reward,
        "rewards": rollout.rewards,
        "advantage": mean,
        "prompt_tokens": len(prompt),
        "completion_tokens": rollout.num_written,
        "finish_reason": rollout.finish_reason,
        "policy_version": versions[0] if versions else None,
        "status": rollout.status,
        "boundary": rollout.boundary,
        "cause": rollout.cause,
        "images": [_image(image) for shown in (prompt, rollout.input) for image in shown.images],
        "token_ids": rollout.token_ids,
        "logprobs": rollout.logprobs,
    }
    if rollout.prompt is not None:
        values["prompt_ids"] = rollout.prompt.token_ids
    if len(set(versions)) > 1:
        values["policy_versions"] = runs(versions)
    if credit is not None:
        values["credit"] = credit
    if scores := _scores(rollout):
        values["scores"] = scores
    return values


def _scores(rollout: Rollout) -> dict[str, tuple[float, ...]]:
    """Those of scorers, and the trainer's own as `policy`, where it computed them beside the sampler's."""
    trainer = {} if rollout.old_logprobs is None else {"policy": rollout.old_logprobs}
    return {**rollout.scores, **trainer}


def _image(image: ImagePiece) -> dict[str, Any]:
    return asdict(ImageRow(image.digest, image.source.width, image.source.height, len(image.token_ids)))


def ledger_rows(
    groups: Sequence[RolloutGroup], *, step: int, dropped: Sequence[RolloutGroup] = ()
) -> Iterator[dict[str, Any]]:
    """One row per group: which prompt served which step, if it was learned, a digest of what came of it."""
    left_out = {group.index for group in dropped}
    for group in sorted((*groups, *dropped), key=lambda group: group.index):
        yield {
            "step": step,
            "group": group.index,
            "uid": group.prompt.uid,
            "samples": len(group.rollouts),
            "learned": group.index not in left_out,
            "policy_version": min((v for r in group.rollouts for v in r.policy_versions), default=None),
            "digest": _digest(group),
        }


def _digest(group: RolloutGroup) -> str:
    """Of tokens, log-probs and rewards, to the bit."""
    digest = hashlib.blake2b(digest_size=16)
    for rollout in group.rollouts:
        digest.update(f"{len(rollout.token_ids)} {rollout.reward!r} ".encode())
        digest.update(array("q", rollout.token_ids))
        digest.update(array("d", rollout.logprobs))
    return digest.hexdigest()
