"""Sums over the vocabulary in a fixed order, on a GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def fixed_row_sums(x: Tensor) -> Tensor:
    """`x.sum(-1)` of `[M, V]` float32, differentiable; takes the place of `row_sums` in `model/fast_cpu/evenly.py`."""
    return _Sums.apply(x)


class _Sums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        from groupwise.model.invariant.rows_kernel import sum_rows

        ctx.size = x.shape[1]
        return sum_rows(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0][:, None].expand(-1, ctx.size)
