"""What a run keeps of its samples: trajectories for people, ledger rows for proof."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

from groupwise.types import RolloutGroup, TrainingBatch


def trajectory_rows(batch: TrainingBatch, *, step: int) -> Iterator[dict[str, Any]]:
    """One row per rollout: prompt, text, each reward, advantage, lengths, finish reason, version."""
    without = [(0.0,) * len(group.rollouts) for group in batch.dropped]
    for group, credit in zip((*batch.groups, *batch.dropped), (*batch.credit, *without), strict=True):
        for rollout, given in zip(group.rollouts, credit, strict=True):
            yield {
                "step": step,
                "group": group.index,
                "uid": group.prompt.uid,
                "sample_index": rollout.sample_index,
                "data_source": group.prompt.data_source,
                "prompt": group.prompt.text,
                "completion": rollout.text,
                "reward": rollout.reward,
                "rewards": dict(rollout.rewards),
                "advantage": given,
                "prompt_tokens": len(group.prompt.token_ids),
                "completion_tokens": rollout.num_written,
                "finish_reason": rollout.finish_reason,
                "policy_version": rollout.policy_versions[0] if rollout.policy_versions else None,
                "status": rollout.status,
                "cause": rollout.cause,
                "token_ids": list(rollout.token_ids),
                "logprobs": list(rollout.logprobs),
            }


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
