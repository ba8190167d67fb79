"""What the advantages share: which rollouts count, and spreads that are exactly zero where nothing differs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from groupwise.algorithms.base import AdvantageInputs

EPSILON = 1e-4
"""Added to a standard deviation, as in TRL: rewards that differ by rounding do not become advantages of size 1."""

LIMIT = 1e30
"""Rewards are held within ±this: their squares stay finite in float64, and the advantages in the trainer's float32."""

GroupRule: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""`(rewards [V], lengths [V]) -> [V]` over the V rollouts of a group that have a reward, not all equal."""


def by_group(inputs: AdvantageInputs, rule: GroupRule) -> tuple[Tensor, ...]:
    """`rule` on each group's rollouts that have a reward; 0 for the others, and for a group of equal rewards."""
    result: list[Tensor] = []
    for rewards, lengths in zip(inputs.rewards, inputs.lengths, strict=True):
        valid = ~torch.isnan(rewards)
        values = rewards[valid].clamp(-LIMIT, LIMIT)
        advantages = torch.zeros_like(rewards)
        if not all_equal(values):
            advantages[valid] = rule(values, lengths[valid].to(rewards.dtype))
        result.append(advantages)
    return tuple(result)


def over_batch(inputs: AdvantageInputs) -> Tensor:
    """`[V]` the rewards of every rollout of the batch that has one."""
    rewards = torch.cat([torch.zeros(0, dtype=torch.float64), *inputs.rewards])
    return rewards[~torch.isnan(rewards)].clamp(-LIMIT, LIMIT)


def all_equal(values: Tensor) -> bool:
    """Whether no two values differ; compared and not computed, since a rounded mean leaves a spread behind."""
    return values.numel() == 0 or bool(values.max() == values.min())


def standardised(values: Tensor, *, centred: bool = False) -> Tensor:
    """(v - mean) / (std + `EPSILON`) with the unbiased std; exactly 0 when all values are equal.

    Args:
        centred: the mean is known to be 0; what rounding made of it is not subtracted, so a zero stays exactly zero.
    """
    if all_equal(values):
        return torch.zeros_like(values)
    return (values if centred else values - values.mean()) / (values.std() + EPSILON)


def whiten(groups: Sequence[Tensor], rewards: Sequence[Tensor], *, centred: bool = False) -> tuple[Tensor, ...]:
    """`groups` standardised over all rollouts of the batch that have a reward; 0 for the others."""
    if not groups:
        return ()
    valid = ~torch.isnan(torch.cat(list(rewards)))
    flat = torch.cat(list(groups))
    result = torch.zeros_like(flat)
    result[valid] = standardised(flat[valid], centred=centred)
    return torch.split(result, [group.shape[0] for group in groups])
