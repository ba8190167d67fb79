"""Linear layers whose rows have the same bits in any company, on a GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class InvariantLinear(nn.Linear):
    """What `groupwise.model.invariant.use` makes of an `nn.Linear`; names and weights stay."""

    def forward(self, input: Tensor) -> Tensor:
        if torch.is_grad_enabled() and (input.requires_grad or self.weight.requires_grad):
            return _Product.apply(input, self.weight, self.bias)
        return _product(input, self.weight, self.bias)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    from groupwise.model.invariant.matmul_kernel import product

    return product(x, weight, bias)


class _Product(torch.autograd.Function):
    """The backward pass is torch's own products: only forward passes must agree."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        grad = grads[0]
        rows = grad.flatten(0, -2)
        of_x = grad @ weight if wants_x else None
        of_weight = rows.t() @ x.flatten(0, -2) if wants_weight else None
        return of_x, of_weight, rows.sum(0) if wants_bias else None
