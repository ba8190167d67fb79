"""Geometric-Mean Policy Optimization."""

from __future__ import annotations

import torch

from groupwise.algorithms.base import LossInputs, TokenLoss
from groupwise.algorithms.kl import bounded_exp
from groupwise.algorithms.losses.shared import log_or_lowest
from groupwise.algorithms.reduce import row_mean


def gmpo(inputs: LossInputs, *, clip_low: float, clip_high: float) -> TokenLoss:
    """l_t = -A·(Π_t c_t)^(1/|o_i|) for every token of row i; c is r, cut above where A > 0 and below elsewhere.

    GMPO's objective (arXiv:2507.20673, section 3), in which |min(rA, clip(r)A)| = c·|A|. The default bounds are the
    paper's range (e^-0.4, e^0.4); with the normaliser `sequence` the row's tokens average to the paper's term.
    """
    log_ratio = inputs.logprobs - inputs.old_logprobs
    low, high = log_or_lowest(1 - clip_low), log_or_lowest(1 + clip_high)
    positive = inputs.advantages > 0
    stopped = torch.where(positive, log_ratio.clamp(max=high), log_ratio.clamp(min=low))
    mean = row_mean(stopped, inputs.row, mask=inputs.mask, num_rows=inputs.num_rows)
    values = -bounded_exp(mean)[inputs.row] * inputs.advantages
    return TokenLoss(values, (log_ratio < low) & (inputs.advantages < 0), (log_ratio > high) & positive)
