"""REINFORCE++-baseline: the group's mean as baseline, the batch's spread as scale."""

from __future__ import annotations

from torch import Tensor

from groupwise.algorithms.advantages.shared import by_group, whiten
from groupwise.algorithms.base import AdvantageInputs


def reinforce_pp_baseline(inputs: AdvantageInputs) -> tuple[Tensor, ...]:
    """A_i = d_i / (std of d over the batch + 1e-4), where d_i = r_i - mean of the group (arXiv:2501.03262).

    The paper also subtracts the batch's mean of d, which is 0.
    """
    return whiten(by_group(inputs, lambda rewards, _: rewards - rewards.mean()), inputs.rewards, centred=True)
