"""REINFORCE leave-one-out."""

from __future__ import annotations

from torch import Tensor

from groupwise.algorithms.advantages.shared import by_group
from groupwise.algorithms.base import AdvantageInputs


def rloo(inputs: AdvantageInputs) -> tuple[Tensor, ...]:
    """A_i = r_i - mean of the group's other rewards (Kool et al. 2019; arXiv:2402.14740). 0 for a group of one."""
    return by_group(inputs, _leave_one_out)


def _leave_one_out(rewards: Tensor, _: Tensor) -> Tensor:
    others = (rewards.sum() - rewards) / (rewards.shape[0] - 1)
    return rewards - others
