"""RMS norms with a backward pass of their own (Zhang & Sennrich 2019, equation 4).

The forward is the Hugging Face module's, operation by operation, so its bits stay. Its own backward walks through every
one of these operations: on a CPU eight times the forward, and each keeps a copy of the activations.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from groupwise.model.exact.blocks import wide
from groupwise.model.fast_gpu.layers import fused, norm

# Those that compute weight * (x / rms(x)) with the statistics in float32; Gemma's weight by 1 + weight.
LLAMA_NORMS = frozenset({"LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm"})


class LeanNorm(nn.Module):
    """Takes the place of a norm in `LLAMA_NORMS`, with its weight under the same name."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        weight, epsilon = norm.weight, norm.variance_epsilon
        assert isinstance(weight, nn.Parameter) and isinstance(epsilon, float), "a norm of another kind"
        self.weight = weight
        self.variance_epsilon = epsilon

    def forward(self, hidden_states: Tensor) -> Tensor:
        if fused(hidden_states):
            return norm(hidden_states, self.weight, self.variance_epsilon)
        if torch.is_grad_enabled() and (hidden_states.requires_grad or self.weight.requires_grad):
            return _RmsNorm.apply(hidden_states, self.weight, self.variance_epsilon)
        return normalised(hidden_states, self.weight, self.variance_epsilon)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"


def normalised(x: Tensor, weight: Tensor, epsilon: float | Tensor) -> Tensor:
    """The norm of `x […, d]` over its last dimension, no gradient recorded; `weight` is `[d]`, or one for each head:
    `[H, d]`."""
    full = x.to(torch.float32)
    unit = (full * _scale(full, epsilon)).to(x.dtype)
    return unit.mul_(weight) if unit.dtype == weight.dtype else weight * unit


def _scale(full: Tensor, epsilon: float | Tensor) -> Tensor:
    """One over the root of the mean square, `[…, 1]`."""
    return (full * full).mean(-1, keepdim=True).add_(epsilon).rsqrt_()


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        full = x.to(torch.float32)
        scale = _scale(full, epsilon)
        ctx.save_for_backward(x, weight, scale)
        return weight * (full * scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        grad, full, factor = wide(grads[0]), wide(x), wide(weight)
        along = (grad * full).flatten(0, -2)
        per_row = scale.flatten().to(along.dtype)
        of_weight = along.t() @ per_row
        # What the mean square takes back: the gradient's part along x.
        back = (along @ factor).mul_(per_row).mul_(per_row).div_(-x.shape[-1])
        of_x = torch.mul(grad, factor, out=along.view(x.shape))
        of_x.addcmul_(full, back.view(scale.shape)).mul_(scale)
        return of_x.to(x.dtype), of_weight.to(weight.dtype), None


def make_norms_lean(model: nn.Module) -> None:
    """Put a `LeanNorm` in the place of every norm that it knows."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child).__name__ in LLAMA_NORMS:
                module.register_module(name, LeanNorm(child).train(child.training))
