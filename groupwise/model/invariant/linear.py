"""Linear layers whose rows have the same bits in any company, on a GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from groupwise.model.fast_cpu.linear import product_gradients
from groupwise.model.invariant.checked_product import (
    MOST_ROWS,
    Product,
    kernel_product,
    library_product,
    library_serves,
    padded_rows,
)


class InvariantLinear(nn.Linear):
    """What `groupwise.model.invariant.use` makes of an `nn.Linear`; names and weights stay."""

    def forward(self, input: Tensor) -> Tensor:
        if not library_serves(self.weight, self.bias):
            return self._by(kernel_product, input)
        # Rows are padded and cut out here and not in the product, which then has no view for its result.
        rows = input.reshape(-1, input.shape[-1])
        some = [padded_rows(part, self.weight, self.bias) for part in rows.split(MOST_ROWS)]
        out = [self._by(library_product, part)[:count] for part, count in some]
        return (out[0] if len(out) == 1 else torch.cat(out)).view(*input.shape[:-1], -1)

    def _by(self, product: Product, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad):
            return _Product.apply(x, self.weight, self.bias, product)
        return product(x, self.weight, self.bias)


class _Product(torch.autograd.Function):
    """The backward pass is torch's own products: only forward passes must agree."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, product: Product) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return *product_gradients(ctx, grads[0], torch.matmul), None
