"""GSPO-token: the completion's ratio as a value, each token's own gradient."""

from __future__ import annotations

import torch

from groupwise.algorithms.base import LossInputs, TokenLoss
from groupwise.algorithms.kl import bounded_exp
from groupwise.algorithms.losses.shared import clipped_surrogate, sequence_log_ratio


def gspo_token(inputs: LossInputs, *, clip_low: float, clip_high: float) -> TokenLoss:
    """l_t = -min(s_t·A_t, clip(s_t, 1 - clip_low, 1 + clip_high)·A_t), s_t = sg[s_i]·π(o_t) / sg[π(o_t)].

    GSPO-token (arXiv:2507.18071, section 4.3). Equal to `gspo`, gradient included, where a row's advantages are equal.
    """
    sequence_ratio = bounded_exp(sequence_log_ratio(inputs).detach())[inputs.row]
    ratio = sequence_ratio * torch.exp(inputs.logprobs - inputs.logprobs.detach())
    return clipped_surrogate(ratio, inputs.advantages, clip_low=clip_low, clip_high=clip_high)
