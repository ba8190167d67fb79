"""Groups become the trainer's batch: advantages, rows, mini-batches, denominators."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from groupwise.algorithms.base import AdvantageInputs, Algorithm
from groupwise.metrics import Max, Mean, Metric, Min, Sum
from groupwise.rollout.microbatches import split_rows
from groupwise.types import Denominators, MiniBatch, Rollout, RolloutGroup, TrainingBatch, TrainingRow


@dataclass(frozen=True, slots=True)
class BatchShape:
    """How a batch is cut.

    Attributes:
        steps_per_batch: optimiser steps made of one batch, each on its share of the prompts.
        micro_batch_tokens: most tokens of one forward and backward pass.
        max_completion_tokens: the constant of Dr. GRPO's normaliser.
    """

    steps_per_batch: int
    micro_batch_tokens: int
    max_completion_tokens: int


def build_batch(
    groups: Sequence[RolloutGroup],
    algorithm: Algorithm,
    *,
    shape: BatchShape,
    reward_weights: dict[str, float],
) -> TrainingBatch:
    """Turn groups `[P]` into mini-batches.

    A failed rollout, or one without a reward, enters neither statistics nor rows. Rows whose advantage is zero have no
    gradient unless KL or entropy act; they are then measured without a backward pass, and counted all the same.

    Args:
        reward_weights: weight of each reward by name.
    """
    advantages = _advantages(groups, algorithm, reward_weights)
    shares = _shares(len(groups), shape.steps_per_batch)
    always = algorithm.needs_reference or algorithm.needs_entropy
    minibatches = [
        _minibatch([row for g in share for row in _rows(groups[g], advantages[g])], shape, always=always)
        for share in shares
    ]
    return TrainingBatch(tuple(groups), advantages, tuple(minibatches), batch_metrics(groups))


def _shares(count: int, steps: int) -> list[range]:
    """Contiguous, of sizes that differ by at most one."""
    assert steps <= count, f"{steps} optimiser steps need at least as many prompts, got {count}"
    return [range(count * i // steps, count * (i + 1) // steps) for i in range(steps)]


def _advantages(
    groups: Sequence[RolloutGroup], algorithm: Algorithm, weights: dict[str, float]
) -> tuple[tuple[float, ...], ...]:
    def value(number: float | None) -> float:
        return math.nan if number is None else number

    inputs = AdvantageInputs(
        rewards=tuple(torch.tensor([value(r.reward) for r in group.rollouts], dtype=torch.float64) for group in groups),
        components=tuple(
            torch.tensor(
                [
                    [value(r.rewards.get(name)) if r.reward is not None else math.nan for name in weights]
                    for r in group.rollouts
                ],
                dtype=torch.float64,
            ).reshape(len(group.rollouts), len(weights))
            for group in groups
        ),
        weights=tuple(weights.values()),
        lengths=tuple(
            torch.tensor([len(r.token_ids) for r in group.rollouts], dtype=torch.float64) for group in groups
        ),
    )
    return tuple(tuple(values.tolist()) for values in algorithm.advantages(inputs))


def _rows(group: RolloutGroup, advantages: Sequence[float]) -> list[TrainingRow]:
    return [
        TrainingRow(
            group=group.index,
            prompt_ids=group.prompt.token_ids,
            token_ids=rollout.token_ids,
            loss_mask=rollout.loss_mask,
            advantages=(advantage,) * len(rollout.token_ids),
            logprobs=rollout.logprobs,
        )
        for rollout, advantage in zip(group.rollouts, advantages, strict=True)
        if rollout.reward is not None and rollout.token_ids
    ]


def _minibatch(rows: Sequence[TrainingRow], shape: BatchShape, *, always: bool) -> MiniBatch:
    learning = [row for row in rows if always or any(row.advantages)]
    measured = [row for row in rows if not (always or any(row.advantages))]
    counts = [sum(row.loss_mask) for row in rows]
    return MiniBatch(
        microbatches=(
            *split_rows(learning, shape.micro_batch_tokens),
            *split_rows(measured, shape.micro_batch_tokens, backward=False),
        ),
        denominators=Denominators(
            tokens=float(sum(counts)),
            sequences=float(sum(1 for count in counts if count)),
            max_tokens=float(shape.max_completion_tokens),
        ),
    )


def batch_metrics(groups: Sequence[RolloutGroup]) -> dict[str, Metric]:
    """Rewards and lengths of the batch, under TRL's names."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    metrics = _reward_metrics(groups, rollouts) | _length_metrics(rollouts)
    metrics["rollout/failed"] = Sum(float(sum(rollout.status == "failed" for rollout in rollouts)))
    return metrics


def _reward_metrics(groups: Sequence[RolloutGroup], rollouts: Sequence[Rollout]) -> dict[str, Metric]:
    per_group = [[r.reward for r in group.rollouts if r.reward is not None] for group in groups]
    compared = [rewards for rewards in per_group if len(rewards) > 1]
    rewards = [r.reward for r in rollouts if r.reward is not None]
    metrics: dict[str, Metric] = {}
    if rewards:
        metrics["reward"] = Mean(sum(rewards), len(rewards))
    if compared:
        metrics["reward_std"] = Mean(sum(map(statistics.stdev, compared)), len(compared))
        equal = sum(max(rewards) == min(rewards) for rewards in compared)
        metrics["frac_reward_zero_std"] = Mean(float(equal), len(compared))
    return metrics


def _length_metrics(rollouts: Sequence[Rollout]) -> dict[str, Metric]:
    lengths = [len(rollout.token_ids) for rollout in rollouts]
    ended = [len(rollout.token_ids) for rollout in rollouts if rollout.finish_reason == "stop"]
    clipped = sum(rollout.finish_reason == "length" for rollout in rollouts)
    metrics: dict[str, Metric] = {
        "completions/mean_length": Mean(float(sum(lengths)), len(lengths)),
        "completions/min_length": Min(float(min(lengths))),
        "completions/max_length": Max(float(max(lengths))),
        "completions/clipped_ratio": Mean(float(clipped), len(lengths)),
    }
    if ended:
        metrics["completions/mean_terminated_length"] = Mean(float(sum(ended)), len(ended))
    return metrics
