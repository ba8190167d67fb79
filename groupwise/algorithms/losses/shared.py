"""What the policy losses share."""

from __future__ import annotations

import math

from torch import Tensor

from groupwise.algorithms.base import LossInputs, TokenLoss
from groupwise.algorithms.kl import bounded_exp
from groupwise.algorithms.reduce import row_mean


def token_ratio(inputs: LossInputs) -> Tensor:
    """`[N]` r_t = π(o_t) / π_old(o_t)."""
    return bounded_exp(inputs.logprobs - inputs.old_logprobs)


def sequence_log_ratio(inputs: LossInputs) -> Tensor:
    """`[R]` the mean over a row's tokens of log r_t."""
    log_ratio = inputs.logprobs - inputs.old_logprobs
    return row_mean(log_ratio, inputs.row, mask=inputs.mask, num_rows=inputs.num_rows)


def clipped_surrogate(ratio: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float) -> TokenLoss:
    """-min(rA, clip(r, 1 - clip_low, 1 + clip_high)·A) per token, and where the second term won."""
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    values = -(ratio * advantages).minimum(clipped * advantages)
    return TokenLoss(values, (ratio < 1 - clip_low) & (advantages < 0), (ratio > 1 + clip_high) & (advantages > 0))


def log_or_lowest(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf
