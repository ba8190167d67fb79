"""Gemma's RMS norms, whose rows have the same bits in any company, on a GPU; Llama's are `LeanNorm`, whose kernel has
that property too."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

GEMMA_NORMS = frozenset({"GemmaRMSNorm", "Gemma3RMSNorm"})
"""transformers' norms by 1 + weight."""


class InvariantGemmaNorm(nn.Module):
    """Takes the place of a norm in `GEMMA_NORMS`, with its weight under the same name."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        weight, epsilon = norm.weight, norm.eps
        assert isinstance(weight, nn.Parameter) and isinstance(epsilon, float), "a norm of another kind"
        self.weight = weight
        self.eps = epsilon

    def forward(self, x: Tensor) -> Tensor:
        return _Norm.apply(x, self.weight, self.eps)


class _Norm(torch.autograd.Function):
    """x / rms(x) times 1 + the weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        from groupwise.model.fast_gpu.norm_kernel import add_norm_rows

        ctx.save_for_backward(x, weight)
        ctx.epsilon = epsilon
        return add_norm_rows(x, None, weight, epsilon, unit_offset=True)[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        full, grad = x.float(), grads[0].float()
        scale = torch.rsqrt(full.square().mean(-1, keepdim=True) + ctx.epsilon)
        unit = full * scale
        of_weight = (grad * unit).flatten(0, -2).sum(0)
        grad = grad * (weight.float() + 1.0)
        # What the mean square takes back: the gradient's part along x.
        of_x = (grad - unit * (grad * unit).mean(-1, keepdim=True)) * scale
        return of_x.to(x.dtype), of_weight.to(weight.dtype), None
