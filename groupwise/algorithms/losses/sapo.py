"""Soft Adaptive Policy Optimization: a sigmoid gate in place of the clip."""

from __future__ import annotations

import torch

from groupwise.algorithms.base import LossInputs, TokenLoss
from groupwise.algorithms.losses.shared import token_ratio


def sapo(inputs: LossInputs, *, temperature_positive: float, temperature_negative: float) -> TokenLoss:
    """l_t = -(4/τ)·sigmoid(τ·(r_t - 1))·A_t, with τ by the advantage's sign.

    SAPO (arXiv:2511.20347). On policy its gradient is that of -r_t·A_t; a higher τ lets go of drifted tokens sooner.
    """
    ratio = token_ratio(inputs)
    temperature = torch.full_like(ratio, temperature_negative)
    temperature = temperature.masked_fill(inputs.advantages > 0, temperature_positive)
    gate = torch.sigmoid(temperature * (ratio - 1)) * 4 / temperature
    return TokenLoss(-gate * inputs.advantages)
