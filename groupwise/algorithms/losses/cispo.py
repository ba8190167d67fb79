"""Clipped importance-sampling-weight policy optimisation: the weight is clipped, the gradient is not."""

from __future__ import annotations

from groupwise.algorithms.base import LossInputs, TokenLoss
from groupwise.algorithms.losses.shared import token_ratio


def cispo(inputs: LossInputs, *, clip_low: float, clip_high: float) -> TokenLoss:
    """l_t = -sg[clip(r_t, 1 - clip_low, 1 + clip_high)]·A_t·log π(o_t).

    MiniMax-M1, equations 4 and 5 (arXiv:2506.13585). The bounds are offsets from 1: `clip_high` = 4 lets weights
    reach 5. `clip_low` = 1 is the paper's choice of no lower bound.
    """
    ratio = token_ratio(inputs).detach()
    weights = ratio.clamp(1 - clip_low, 1 + clip_high)
    return TokenLoss(-weights * inputs.advantages * inputs.logprobs, ratio < 1 - clip_low, ratio > 1 + clip_high)
