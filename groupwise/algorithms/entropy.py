"""Entropy: which tokens are decisions, and how strong a bonus should be."""

from __future__ import annotations

import torch
from torch import Tensor

from groupwise.algorithms.reduce import row_sum


def top_entropy_mask(entropy: Tensor, *, fraction: float, mask: Tensor, row: Tensor, num_rows: int) -> Tensor:
    """`[N]` 1 for each row's ⌈fraction·|o_i|⌉ unmasked tokens of most entropy, else 0; ties keep the earlier token.

    The forking tokens of "Beyond the 80/20 rule" (arXiv:2506.01939). The paper ranks over the batch; here the ranks are
    within a row, so that the result does not depend on how the batch is split.
    """
    ranked = torch.where(mask > 0, entropy.detach().double(), float("-inf"))
    by_entropy = torch.sort(ranked, descending=True, stable=True).indices
    order = by_entropy[torch.sort(row[by_entropy], stable=True).indices]
    ones = torch.ones_like(row)
    row_sizes = row_sum(ones, row, num_rows=num_rows)
    starts = torch.cumsum(row_sizes, 0) - row_sizes
    rank = torch.empty_like(row)
    rank[order] = torch.arange(row.shape[0], device=row.device) - starts[row[order]]
    # 0.07 · 100 is a hair above 7 in floating point, and must not keep an eighth token.
    kept = torch.ceil(fraction * row_sum(mask.double(), row, num_rows=num_rows) - 1e-9)
    return ((rank < kept[row]) & (mask > 0)).to(mask.dtype)


def adapt_entropy_coef(
    coef: float, entropy: float, *, target: float, step: float = 0.005, low: float = 0.0, high: float = 1.0
) -> float:
    """The next bonus weight: up by `step` when `entropy` (nats) is below `target`, else down, within [low, high].

    The adaptive entropy control of Skywork-OR1 (arXiv:2505.22312), which applies the bonus only while entropy ≤ target.
    """
    assert low <= high, f"adaptive entropy: low {low} is above high {high}"
    return min(max(coef + (step if entropy < target else -step), low), high)
