"""REINFORCE++: the batch is the baseline."""

from __future__ import annotations

from torch import Tensor

from groupwise.algorithms.advantages.shared import LIMIT, whiten
from groupwise.algorithms.base import AdvantageInputs


def reinforce_pp(inputs: AdvantageInputs) -> tuple[Tensor, ...]:
    """A_i = (r_i - mean of the batch) / (std of the batch + 1e-4), the global normalisation of arXiv:2501.03262."""
    return whiten([rewards.clamp(-LIMIT, LIMIT) for rewards in inputs.rewards], inputs.rewards)
