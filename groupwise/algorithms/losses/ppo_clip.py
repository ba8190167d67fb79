"""PPO's clipped surrogate with separate bounds, and the dual clip."""

from __future__ import annotations

import torch

from groupwise.algorithms.base import LossInputs, TokenLoss
from groupwise.algorithms.losses.shared import clipped_surrogate, token_ratio


def ppo_clip(inputs: LossInputs, *, clip_low: float, clip_high: float, dual_clip: float | None = None) -> TokenLoss:
    """l_t = -min(r_t·A_t, clip(r_t, 1 - clip_low, 1 + clip_high)·A_t).

    PPO, equation 7 (arXiv:1707.06347); GRPO, equation 3 (arXiv:2402.03300); two bounds as in DAPO, equation 10
    (arXiv:2503.14476). With `dual_clip` = c and A_t < 0 the loss is at most -c·A_t: dual-clip PPO (arXiv:1912.09729).
    """
    term = clipped_surrogate(token_ratio(inputs), inputs.advantages, clip_low=clip_low, clip_high=clip_high)
    if dual_clip is None:
        return term
    bounded = term.values.minimum(-dual_clip * inputs.advantages)
    return TokenLoss(torch.where(inputs.advantages < 0, bounded, term.values), term.clipped_low, term.clipped_high)
