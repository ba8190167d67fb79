"""Maximum-likelihood reinforcement learning."""

from __future__ import annotations

from torch import Tensor

from groupwise.algorithms.advantages.shared import by_group
from groupwise.algorithms.base import AdvantageInputs


def maxrl(inputs: AdvantageInputs) -> tuple[Tensor, ...]:
    """A_i = (r_i - mean) / mean of |r| over the group; 0 for a group without a success (arXiv:2602.02710).

    For rewards of 0 or more, the paper's case, the mean of |r| is the mean. For others it keeps the sign, and a bound
    of 2·G, where dividing by a mean near or below 0 would give neither.
    """
    return by_group(inputs, lambda rewards, _: (rewards - rewards.mean()) / rewards.abs().mean())
