"""Sums over rows, and the weights by which per-token values become one loss.

`N` tokens of a micro-batch belong to `R` rows; every row is whole within its micro-batch.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor

from groupwise.batches import Denominators

Normaliser: TypeAlias = Literal["token", "sequence", "constant"]


def row_sum(values: Tensor, row: Tensor, *, num_rows: int) -> Tensor:
    """`[R]` sums of `values [N]` by `row [N]`."""
    return values.new_zeros(num_rows).index_add(0, row, values)


def row_mean(values: Tensor, row: Tensor, *, mask: Tensor, num_rows: int) -> Tensor:
    """`[R]` means of `values [N]` over each row's tokens of `mask` 1; 0 for a row without any."""
    total = row_sum(values * mask, row, num_rows=num_rows)
    return total / row_sum(mask, row, num_rows=num_rows).clamp(min=1)


def token_weights(kind: Normaliser, mask: Tensor, *, row: Tensor, num_rows: int, denominators: Denominators) -> Tensor:
    """`[N]` weights w such that Σ_t w_t·l_t, summed over the micro-batches, is the optimiser batch's loss.

    With |o_i| the number of unmasked tokens of row i, counted over the whole optimiser batch:

    - `token`: 1 / Σ_i |o_i|, DAPO's mean over all tokens (arXiv:2503.14476, equation 12).
    - `sequence`: 1 / (rows · |o_i|), GRPO's mean over sequences of token means (arXiv:2402.03300, equation 3).
    - `constant`: 1 / (rows · max_tokens), Dr. GRPO's sum over a constant (arXiv:2503.20783, section 3.2).

    A batch without a single unmasked token has the loss 0.
    """
    if kind == "token":
        return mask / _at_least_one(denominators.tokens)
    if kind == "constant":
        return mask / _at_least_one(denominators.sequences * denominators.max_tokens)
    lengths = row_sum(mask, row, num_rows=num_rows).clamp(min=1)
    return mask / torch.index_select(lengths, 0, row) / _at_least_one(denominators.sequences)


def _at_least_one(count: float) -> float:
    return max(count, 1.0)
