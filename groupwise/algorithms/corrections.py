"""When the sampler's probabilities are not the policy's: weights and masks on the policy loss, without gradient.

The mismatch is w_t = π_old(o_t) / π_sampler(o_t): `old` recomputed by the trainer, `sampler` as the engine reported
it. The loss's own ratio stays over the recomputed `old`, so the full weight gives AReaL's decoupled objective
(arXiv:2505.24298).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from groupwise.algorithms.kl import bounded_exp
from groupwise.algorithms.reduce import row_mean, row_sum

CorrectionKind: TypeAlias = Literal["none", "truncate", "mask", "decoupled"]
CorrectionLevel: TypeAlias = Literal["token", "sequence", "geometric"]


@dataclass(frozen=True, slots=True)
class Correction:
    """Settings of the mismatch correction; the defaults change nothing.

    Attributes:
        veto: a row with any token of w_t below this is left out whole.
        off_policy_mask: a row of negative advantage is left out when the mean of log(π_sampler / π) is above this.

    Example:
        Correction(kind="truncate", level="token", high=2.0)
    """

    kind: CorrectionKind = "none"
    level: CorrectionLevel = "token"
    low: float = 0.0
    high: float = float("inf")
    veto: float | None = None
    off_policy_mask: float | None = None


NO_CORRECTION = Correction()


def mismatch(log_ratio: Tensor, level: CorrectionLevel, *, mask: Tensor, row: Tensor, num_rows: int) -> Tensor:
    """`[N]` weights from `log_ratio [N]` = log π_old - log π_sampler.

    - `token`: w_t.
    - `sequence`: the product of the row's w_t, the exact importance weight of the completion, of high variance.
    - `geometric`: that product's |o|-th root, which does not grow with length.
    """
    if level == "token":
        return bounded_exp(log_ratio)
    if level == "sequence":
        per_row = row_sum(log_ratio * mask, row, num_rows=num_rows)
    else:
        per_row = row_mean(log_ratio, row, mask=mask, num_rows=num_rows)
    return bounded_exp(per_row)[row]


def truncated(weights: Tensor, *, high: float) -> Tensor:
    """min(w, high): truncated importance sampling (Ionides 2008; Yao et al. 2025 for samplers of language models)."""
    return weights.clamp(max=high)


def masked(weights: Tensor, *, low: float, high: float) -> Tensor:
    """w where low ≤ w ≤ high, 0 elsewhere: masked importance sampling, IcePop at token level (Ling Team 2025)."""
    return torch.where((weights >= low) & (weights <= high), weights, torch.zeros_like(weights))


def veto_mask(log_ratio: Tensor, *, threshold: float, mask: Tensor, row: Tensor, num_rows: int) -> Tensor:
    """`[N]` 0 for every token of a row in which one unmasked token has w_t < threshold, else 1."""
    vetoed = (torch.exp(log_ratio) < threshold).to(mask.dtype) * mask
    return (row_sum(vetoed, row, num_rows=num_rows) == 0).to(mask.dtype)[row]


def off_policy_sequence_mask(
    log_drift: Tensor, advantages: Tensor, *, threshold: float, mask: Tensor, row: Tensor, num_rows: int
) -> Tensor:
    """`[N]` 0 where the advantage is negative and the row's mean of `log_drift [N]` is above the threshold, else 1.

    `log_drift` is log(π_sampler / π): the off-policy sequence masking of DeepSeek-V3.2 (arXiv:2512.02556, section 3.1).
    """
    drift = row_mean(log_drift, row, mask=mask, num_rows=num_rows)[row]
    return 1 - ((advantages < 0) & (drift > threshold)).to(mask.dtype)
