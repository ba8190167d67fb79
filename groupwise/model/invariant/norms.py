"""RMS norms whose rows have the same bits in any company, on a GPU: Llama's form and Gemma's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from groupwise.model.fast_cpu.norms import LeanNorm
from groupwise.model.fast_gpu.layers import fused

GEMMA_NORMS = frozenset({"GemmaRMSNorm", "Gemma3RMSNorm"})
"""transformers' norms by 1 + weight."""


class InvariantNorm(LeanNorm):
    """What `groupwise.model.invariant.use` makes of a `LeanNorm`."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        if fused(hidden_states):
            return super().forward(hidden_states)
        return _Norm.apply(hidden_states, self.weight, self.variance_epsilon, False)


class InvariantGemmaNorm(nn.Module):
    """Takes the place of a norm in `GEMMA_NORMS`, with its weight under the same name."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        weight, epsilon = norm.weight, norm.eps
        assert isinstance(weight, nn.Parameter) and isinstance(epsilon, float), "a norm of another kind"
        self.weight = weight
        self.eps = epsilon

    def forward(self, x: Tensor) -> Tensor:
        return _Norm.apply(x, self.weight, self.eps, True)


class _Norm(torch.autograd.Function):
    """x / rms(x) times the weight, or 1 + the weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float, unit_offset: bool) -> Tensor:
        from groupwise.model.invariant.rows_kernel import norm_rows

        ctx.save_for_backward(x, weight)
        ctx.epsilon, ctx.unit_offset = epsilon, unit_offset
        return norm_rows(x, weight, epsilon, unit_offset=unit_offset)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weight = ctx.saved_tensors
        full, grad = x.float(), grads[0].float()
        factor = weight.float() + 1.0 if ctx.unit_offset else weight.float()
        scale = torch.rsqrt(full.square().mean(-1, keepdim=True) + ctx.epsilon)
        unit = full * scale
        of_weight = (grad * unit).flatten(0, -2).sum(0)
        grad = grad * factor
        # What the mean square takes back: the gradient's part along x.
        of_x = (grad - unit * (grad * unit).mean(-1, keepdim=True)) * scale
        return of_x.to(x.dtype), of_weight.to(weight.dtype), None, None
