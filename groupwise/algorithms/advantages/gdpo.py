"""Group reward-decoupled normalisation for several rewards."""

from __future__ import annotations

import torch
from torch import Tensor

from groupwise.algorithms.advantages.shared import LIMIT, standardised, whiten
from groupwise.algorithms.base import AdvantageInputs


def gdpo(inputs: AdvantageInputs) -> tuple[Tensor, ...]:
    """Each reward standardised within its group, their weighted sum standardised over the batch (arXiv:2601.05242).

    Rewards that differ in scale keep their say, where the sum of raw values would let the widest rule. A reward
    function that gave a rollout no value adds 0 to it.
    """
    groups = zip(inputs.components, inputs.rewards, strict=True)
    decoupled = [_decoupled(components, rewards, weights=inputs.weights) for components, rewards in groups]
    return whiten(decoupled, inputs.rewards, centred=True)


def _decoupled(components: Tensor, rewards: Tensor, *, weights: tuple[float, ...]) -> Tensor:
    """`[G]` Σ_k w_k·z_k, from `components [G, K]`; rollouts without a reward enter no statistic."""
    total = components.new_zeros(components.shape[0])
    for values, weight in zip(components.clamp(-LIMIT, LIMIT).unbind(1), weights, strict=True):
        valid = ~(torch.isnan(values) | torch.isnan(rewards))
        total[valid] += weight * standardised(values[valid])
    return total
