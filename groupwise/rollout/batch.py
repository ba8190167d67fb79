"""Groups become the trainer's batch: advantages, rows, mini-batches, denominators."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from groupwise.algorithms.base import AdvantageInputs, Algorithm
from groupwise.algorithms.kl import kl_in_reward, kl_penalty
from groupwise.batches import Credit, Denominators, MiniBatch, TrainingBatch, TrainingRow
from groupwise.empty_steps import Usable
from groupwise.environments import ENVIRONMENT
from groupwise.metrics import Max, Mean, Metric, Min, Sum
from groupwise.rollout.credit import add_token_terms, credit_metrics
from groupwise.tensors import floats
from groupwise.types import REFERENCE, Rollout, RolloutGroup


@dataclass(frozen=True, slots=True)
class BatchShape:
    """How a batch is cut.

    Attributes:
        steps_per_batch: optimiser steps made of one batch, each on its share of the prompts.
        passes_per_batch: times that the batch is learned.
        max_completion_tokens: the constant of Dr. GRPO's normaliser.
    """

    steps_per_batch: int
    max_completion_tokens: int
    passes_per_batch: int = 1


def build_batch(
    groups: Sequence[RolloutGroup],
    algorithm: Algorithm,
    *,
    shape: BatchShape,
    reward_weights: dict[str, float],
    dropped: Sequence[RolloutGroup] = (),
) -> TrainingBatch:
    """Turn groups `[P]` into mini-batches.

    A failed rollout, or one without a reward, enters neither statistics nor rows. Rows whose advantage is zero have no
    gradient unless KL or entropy act; they are then measured without a backward pass, and counted all the same.

    Args:
        reward_weights: weight of each reward by name.
        dropped: groups sampled for this batch that it leaves out.
    """
    rewards = [_rewards(group) for group in groups]
    metrics = batch_metrics([*groups, *dropped])
    if algorithm.kl_in_reward:
        penalised = [_less_kl(raw, group, algorithm) for raw, group in zip(rewards, groups, strict=True)]
        metrics["reward_kl_penalty"] = _mean_difference(rewards, penalised)
        rewards = penalised
    credit = add_token_terms(groups, _advantages(groups, rewards, algorithm, weights=reward_weights), algorithm)
    metrics |= credit_metrics(groups, algorithm)
    minibatches = [
        _minibatch([row for g in share for row in _rows(groups[g], credit[g], algorithm)], shape, algorithm)
        for share in _shares(len(groups), shape.steps_per_batch)
    ]
    return TrainingBatch(tuple(groups), credit, tuple(minibatches) * shape.passes_per_batch, metrics, tuple(dropped))


def teaches(group: RolloutGroup, algorithm: Algorithm, *, reward_weights: dict[str, float]) -> bool:
    """Whether the group alone, by its rewards, has an advantage that is not zero; with a teacher every one teaches."""
    if algorithm.teacher is not None:
        return any(is_learnable(rollout, algorithm) for rollout in group.rollouts)
    (advantages,) = _advantages([group], [_rewards(group)], algorithm, weights=reward_weights)
    return any(advantages)


def _shares(count: int, steps: int) -> list[range]:
    """Contiguous, of sizes that differ by at most one; some are empty where there are fewer groups than steps."""
    return [range(count * i // steps, count * (i + 1) // steps) for i in range(steps)]


def _rewards(group: RolloutGroup) -> Tensor:
    """`[G]`, NaN where there is none."""
    return torch.tensor([math.nan if r.reward is None else r.reward for r in group.rollouts], dtype=torch.float64)


def _less_kl(rewards: Tensor, group: RolloutGroup, algorithm: Algorithm) -> Tensor:
    """`[G]` rewards of a group less the KL of its completions at sampling time."""
    counted = [(i, r) for i, r in enumerate(group.rollouts) if REFERENCE in r.scores]
    old = [x for _, r in counted for x in (r.logprobs if r.old_logprobs is None else r.old_logprobs)]
    kl = kl_penalty(
        torch.tensor(old, dtype=torch.float64),
        torch.tensor([x for _, r in counted for x in r.scores[REFERENCE]], dtype=torch.float64),
        estimator=algorithm.kl_estimator,
    )
    mask = torch.tensor([float(x) for _, r in counted for x in r.loss_mask], dtype=torch.float64)
    row = torch.tensor([i for i, r in counted for _ in r.token_ids], dtype=torch.int64)
    return kl_in_reward(rewards, kl, coef=algorithm.kl_coef, mask=mask, row=row)


def _mean_difference(before: Sequence[Tensor], after: Sequence[Tensor]) -> Mean:
    taken = [x for one, other in zip(before, after, strict=True) for x in floats(one - other) if not math.isnan(x)]
    return Mean(sum(taken), len(taken))


def _advantages(
    groups: Sequence[RolloutGroup], rewards: Sequence[Tensor], algorithm: Algorithm, *, weights: dict[str, float]
) -> tuple[tuple[float, ...], ...]:
    def value(number: float | None) -> float:
        return math.nan if number is None else number

    inputs = AdvantageInputs(
        rewards=tuple(rewards),
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
        lengths=tuple(torch.tensor([r.num_written for r in group.rollouts], dtype=torch.float64) for group in groups),
    )
    return tuple(tuple(floats(values)) for values in algorithm.advantages(inputs))


def _rows(group: RolloutGroup, credit: Sequence[Credit], algorithm: Algorithm) -> list[TrainingRow]:
    return [
        TrainingRow(
            group=group.index,
            prompt=rollout.prompt or group.prompt.input,
            follows=rollout.input,
            loss_mask=rollout.loss_mask,
            advantages=_per_token(given, len(rollout.token_ids)),
            logprobs=rollout.logprobs,
            old_logprobs=rollout.old_logprobs,
            ref_logprobs=rollout.scores.get(REFERENCE),
            sides=rollout.sides,
        )
        for rollout, given in zip(group.rollouts, credit, strict=True)
        if is_learnable(rollout, algorithm) and not (algorithm.masks_truncated and rollout.is_cut)
    ]


def _per_token(credit: Credit, size: int) -> tuple[float, ...]:
    return credit if isinstance(credit, tuple) else (credit,) * size


def is_learnable(rollout: Rollout, algorithm: Algorithm) -> bool:
    """Whether it has tokens, and a reward for them where the algorithm needs one."""
    if not rollout.token_ids or rollout.status == "failed":
        return False
    return rollout.reward is not None or not algorithm.needs_reward


def usable_samples(groups: Sequence[RolloutGroup], algorithm: Algorithm) -> Usable:
    """How many of the groups' rollouts could be learned from, were their rewards not equal, and why the others not."""
    causes = [_why_unusable(rollout, algorithm) for group in groups for rollout in group.rollouts]
    return Usable(causes.count(""), [cause for cause in causes if cause])


def _why_unusable(rollout: Rollout, algorithm: Algorithm) -> str:
    if rollout.cause:
        return rollout.cause
    if rollout.reward is None and algorithm.needs_reward:
        return "no reward function gave a value"
    if not any(rollout.loss_mask):
        return "it has no token to learn"
    if algorithm.masks_truncated and rollout.is_cut:
        budget = "rollout.max_completion_tokens" if rollout.finish_reason == "length" else "environment.max_turns"
        return f'it was cut off at {budget}, and algorithm.overlong = "mask" leaves such out'
    return ""


def _minibatch(rows: Sequence[TrainingRow], shape: BatchShape, algorithm: Algorithm) -> MiniBatch:
    always = algorithm.learns_without_advantage
    learning = [row for row in rows if always or any(row.advantages)]
    measured = [row for row in rows if not (always or any(row.advantages))]
    counts = [sum(row.loss_mask) for row in rows]
    return MiniBatch(
        rows=tuple(learning),
        measured=tuple(measured),
        denominators=Denominators(
            tokens=float(sum(counts)),
            sequences=float(sum(1 for count in counts if count)),
            max_tokens=float(shape.max_completion_tokens),
        ),
    )


def batch_metrics(groups: Sequence[RolloutGroup]) -> dict[str, Metric]:
    """Rewards and lengths of the batch, under TRL's names."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    metrics = _reward_metrics(groups, rollouts) | _length_metrics(rollouts) | _episode_metrics(rollouts)
    sampled = sum(len(group.prompt.token_ids) + len(r.token_ids) for group in groups for r in group.rollouts)
    metrics["num_tokens"] = Sum(float(sampled))
    metrics["rollout/failed"] = Sum(float(sum(rollout.status == "failed" for rollout in rollouts)))
    for boundary in sorted({rollout.boundary for rollout in rollouts if rollout.boundary}):
        metrics[f"rollout/failed/{boundary}"] = Sum(float(sum(rollout.boundary == boundary for rollout in rollouts)))
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
    lengths = [rollout.num_written for rollout in rollouts]
    ended = [rollout.num_written for rollout in rollouts if rollout.finish_reason == "stop"]
    clipped = sum(rollout.is_cut for rollout in rollouts)
    metrics: dict[str, Metric] = {
        "completions/mean_length": Mean(float(sum(lengths)), len(lengths)),
        "completions/min_length": Min(float(min(lengths))),
        "completions/max_length": Max(float(max(lengths))),
        "completions/clipped_ratio": Mean(float(clipped), len(lengths)),
    }
    if ended:
        metrics["completions/mean_terminated_length"] = Mean(float(sum(ended)), len(ended))
        metrics["completions/min_terminated_length"] = Min(float(min(ended)))
        metrics["completions/max_terminated_length"] = Max(float(max(ended)))
    return metrics


def _episode_metrics(rollouts: Sequence[Rollout]) -> dict[str, Metric]:
    """Of episodes in which an environment had its say; nothing where all are single turns."""
    answers = [sum(segment.by == "environment" for segment in rollout.segments) for rollout in rollouts]
    given = [rollout.rewards[ENVIRONMENT] for rollout in rollouts if rollout.rewards.get(ENVIRONMENT) is not None]
    metrics: dict[str, Metric] = {}
    if any(answers):
        written = sum(len(rollout.token_ids) - rollout.num_written for rollout in rollouts)
        metrics["environment/answers_per_episode"] = Mean(float(sum(answers)), len(rollouts))
        metrics["environment/tokens_per_episode"] = Mean(float(written), len(rollouts))
        metrics["environment/share_of_episodes"] = Mean(float(sum(map(bool, answers))), len(rollouts))
    if given:
        metrics[f"rewards/{ENVIRONMENT}/mean"] = Mean(math.fsum(x for x in given if x is not None), len(given))
    return metrics
