"""Entropy: which tokens are decisions, and how strong a bonus should be."""

from __future__ import annotations

from dataclasses import dataclass

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


@dataclass(frozen=True, slots=True)
class EntropyControl:
    """The adaptive entropy control of Skywork-OR1 (arXiv:2505.22312).

    Attributes:
        target: nats, the entropy below which the bonus acts.
        step: by how much its weight changes in one training step, within `low` and `high`.

    Example:
        EntropyControl(target=0.2).adapt(0.01, 0.15)     # 0.015: entropy is below the target
    """

    target: float
    step: float = 0.005
    low: float = 0.0
    high: float = 1.0

    def adapt(self, coef: float, entropy: float) -> float:
        """The next weight: up by `step` when `entropy` (nats) is below the target, else down, within the bounds."""
        return min(max(coef + (self.step if entropy < self.target else -self.step), self.low), self.high)

    def acting(self, coef: float, entropy: float) -> float:
        """The weight that acts: `coef` while `entropy` is not above the target, else 0."""
        return coef if entropy <= self.target else 0.0
