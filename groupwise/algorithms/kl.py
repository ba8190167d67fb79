"""KL from the policy to the reference, estimated on the sampled tokens.

With d = log π_ref - log π (Schulman, "Approximating KL divergence", 2020):

- `k1` = -d. Unbiased as a value, of high variance. Its gradient is ∇log π, whose mean under the policy is zero: as a
  loss it
  regularises nothing on average. It is the one to subtract from rewards.
- `k2` = d² / 2. Biased as a value; its gradient, -d·∇log π, is on average exactly that of the KL.
- `k3` = exp(d) - d - 1. Unbiased, never negative; the one of GRPO (arXiv:2402.03300, equation 4). Its gradient,
  (1 - exp(d))·∇log π, is on average that of the *reverse* direction, KL(π_ref ‖ π).

Gradients are those of the formulas as they stand.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor

from groupwise.algorithms.reduce import row_sum

KlEstimator: TypeAlias = Literal["k1", "k2", "k3"]
KlPlace: TypeAlias = Literal["loss", "reward"]

MAX_LOG_RATIO = 20.0
"""exp() is taken of at most ±this. Beyond e^20 = 5·10^8 a float32 loss has no digits left, and an overflow would turn a
clipped token's zero gradient into NaN."""


def bounded_exp(log_ratio: Tensor) -> Tensor:
    """exp of `log_ratio` held within ±`MAX_LOG_RATIO`; no gradient beyond."""
    return torch.exp(log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO))


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, *, estimator: KlEstimator) -> Tensor:
    """`[N]` KL estimate of each token, in nats; differentiable in `logprobs [N]`."""
    if estimator == "k1":
        return logprobs - ref_logprobs
    if estimator == "k2":
        return 0.5 * (logprobs - ref_logprobs).square()
    log_ratio = (ref_logprobs - logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return torch.expm1(log_ratio) - log_ratio


def kl_in_reward(rewards: Tensor, token_kl: Tensor, *, coef: float, mask: Tensor, row: Tensor) -> Tensor:
    """`[R]` rewards less `coef` times each row's summed KL, as in InstructGPT (arXiv:2203.02155, equation 2).

    Args:
        rewards: `[R]`, one per row; NaN stays NaN.
        token_kl: `[N]`, from `kl_penalty` (usually `k1`) on log-probs at sampling time.
    """
    total = row_sum(token_kl.detach().to(rewards.dtype) * mask.to(rewards.dtype), row, num_rows=rewards.shape[0])
    return rewards - coef * total
