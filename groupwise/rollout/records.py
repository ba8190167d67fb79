"""What a run keeps of its samples: trajectories for people, ledger rows for proof."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

from groupwise.batches import Credit, TrainingBatch
from groupwise.inputs import ModelInput
from groupwise.trajectories import ImageRow, SegmentRow, TrajectoryRow, split_credit
from groupwise.types import Rollout, RolloutGroup, Segment


def trajectory_rows(batch: TrainingBatch, *, step: int) -> Iterator[TrajectoryRow]:
    """One row per rollout, those of dropped groups last, with a credit of 0."""
    without = [(0.0,) * len(group.rollouts) for group in batch.dropped]
    for group, credit in zip((*batch.groups, *batch.dropped), (*batch.credit, *without), strict=True):
        for rollout, given in zip(group.rollouts, credit, strict=True):
            yield _trajectory_row(group, rollout, given, step=step)


def _trajectory_row(group: RolloutGroup, rollout: Rollout, given: Credit, *, step: int) -> TrajectoryRow:
    prompt = rollout.prompt or group.prompt.input
    mean, credit = split_credit(given)
    return TrajectoryRow(
        step=step,
        group=group.index,
        uid=group.prompt.uid,
        draw=rollout.key.draw,
        sample_index=rollout.sample_index,
        data_source=group.prompt.data_source,
        prompt=group.prompt.text,
        prompt_tokens=len(prompt),
        prompt_ids=None if rollout.prompt is None else rollout.prompt.token_ids,
        segments=tuple(map(_segment_row, rollout.segments)),
        token_ids=rollout.token_ids,
        logprobs=rollout.logprobs,
        policy_versions=rollout.policy_versions,
        rewards=rollout.rewards,
        reward=rollout.reward,
        advantage=mean,
        credit=credit,
        scores=_scores(rollout),
        finish_reason=rollout.finish_reason,
        status=rollout.status,
        boundary=rollout.boundary,
        cause=rollout.cause,
        images=_image_rows(prompt, rollout.input),
    )


def _scores(rollout: Rollout) -> dict[str, tuple[float, ...]]:
    """Those of scorers, and the trainer's own as `policy`, where it computed them beside the sampler's."""
    trainer = {} if rollout.old_logprobs is None else {"policy": rollout.old_logprobs}
    return {**rollout.scores, **trainer}


def _segment_row(segment: Segment) -> SegmentRow:
    return SegmentRow(
        by=segment.by,
        text=segment.text,
        num_tokens=len(segment.token_ids),
        finish_reason=segment.finish_reason,
        reward=segment.reward,
        messages=segment.messages,
    )


def _image_rows(*inputs: ModelInput) -> tuple[ImageRow, ...]:
    images = (image for given in inputs for image in given.images)
    return tuple(
        ImageRow(image.digest, image.source.width, image.source.height, len(image.token_ids)) for image in images
    )


def ledger_rows(
    groups: Sequence[RolloutGroup], *, step: int, dropped: Sequence[RolloutGroup] = ()
) -> Iterator[dict[str, Any]]:
    """One row per group: which prompt served which step, if it was learned, a digest of what came of it."""
    left_out = {group.index for group in dropped}
    for group in sorted((*groups, *dropped), key=lambda group: group.index):
        content = repr([(r.token_ids, r.logprobs, r.reward) for r in group.rollouts]).encode()
        yield {
            "step": step,
            "group": group.index,
            "uid": group.prompt.uid,
            "samples": len(group.rollouts),
            "learned": group.index not in left_out,
            "policy_version": min((v for r in group.rollouts for v in r.policy_versions), default=None),
            "digest": hashlib.blake2b(content, digest_size=16).hexdigest(),
        }
