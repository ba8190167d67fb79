"""No outcome: what is learned comes from credit per token alone."""

from __future__ import annotations

import torch
from torch import Tensor

from groupwise.algorithms.base import AdvantageInputs


def none(inputs: AdvantageInputs) -> tuple[Tensor, ...]:
    """A_i = 0, whatever the rewards."""
    return tuple(torch.zeros_like(rewards) for rewards in inputs.rewards)
