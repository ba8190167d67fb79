"""Group Sequence Policy Optimization: one ratio per completion."""

from __future__ import annotations

from groupwise.algorithms.base import LossInputs, TokenLoss
from groupwise.algorithms.kl import bounded_exp
from groupwise.algorithms.losses.shared import clipped_surrogate, sequence_log_ratio


def gspo(inputs: LossInputs, *, clip_low: float, clip_high: float) -> TokenLoss:
    """l_t = -min(s_i·A, clip(s_i, 1 - clip_low, 1 + clip_high)·A) for every token of row i, s_i = exp(mean_t log r_t).

    GSPO, equations 5 and 7 (arXiv:2507.18071); with the normaliser `sequence` the row's tokens average to the paper's
    term.
    """
    ratio = bounded_exp(sequence_log_ratio(inputs))[inputs.row]
    return clipped_surrogate(ratio, inputs.advantages, clip_low=clip_low, clip_high=clip_high)
