"""The kernels as functions that autograd knows, and where they serve."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

_KINDS = (torch.bfloat16, torch.float32)


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def fused(x: Tensor) -> bool:
    """Whether the kernels serve: on a GPU, with Triton, in bfloat16 or float32."""
    return _is_on_gpu(x) and x.dtype in _KINDS and _has_triton()


def _is_on_gpu(x: Tensor) -> bool:
    return x.is_cuda


def norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """The RMS norm of `x […, H]` by `weight [H]`."""
    return _Norm.apply(x, weight, epsilon)


def add_norm(fresh: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """The sum of both, `[…, H]`, and its norm."""
    return _AddNorm.apply(fresh, residual, weight, epsilon)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        from groupwise.model.fast_gpu.norm_kernel import add_norm_rows

        ctx.save_for_backward(x, weight)
        ctx.epsilon = epsilon
        return add_norm_rows(x, None, weight, epsilon)[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        from groupwise.model.fast_gpu.norm_kernel import norm_gradients

        x, weight = ctx.saved_tensors
        return *norm_gradients(x, weight, grads[0], None, ctx.epsilon), None


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, fresh: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        from groupwise.model.fast_gpu.norm_kernel import add_norm_rows

        whole, normed = add_norm_rows(fresh, residual, weight, epsilon)
        ctx.save_for_backward(whole, weight)
        ctx.epsilon = epsilon
        return whole, normed

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        from groupwise.model.fast_gpu.norm_kernel import norm_gradients

        whole, weight = ctx.saved_tensors
        of_sum, of_weight = norm_gradients(whole, weight, grads[1], grads[0], ctx.epsilon)
        return of_sum, of_sum, of_weight, None


def turned(
    query: Tensor, key: Tensor, norms: tuple[Tensor, Tensor] | None, cos: Tensor, sin: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    """Queries `[N, Hq, d]` and keys `[N, Hkv, d]`, normed by weights `[d]` if the architecture norms them, and turned.

    Args:
        cos, sin: `[N, d]`, the sines of the first half negated.
    """
    weights = (None, None) if norms is None else norms
    return _Turned.apply(query, key, *weights, cos, sin, epsilon)


class _Turned(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        query_weight: Tensor | None,
        key_weight: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        epsilon: float,
    ) -> tuple[Tensor, Tensor]:
        from groupwise.model.fast_gpu.rotary_kernel import Angles, rotated

        norms = None if query_weight is None or key_weight is None else (query_weight, key_weight)
        if norms is None:  # the rotation's gradient needs no queries
            ctx.save_for_backward(None, None, None, None, cos, sin)
        else:
            ctx.save_for_backward(query, key, *norms, cos, sin)
        ctx.epsilon = epsilon
        return rotated(query, key, norms, Angles(cos, sin), epsilon)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        from groupwise.model.fast_gpu.rotary_kernel import Angles, rotary_gradients

        query, key, query_weight, key_weight, cos, sin = ctx.saved_tensors
        founds = [
            rotary_gradients(grad if x is None else x, weight, Angles(cos, sin), grad, ctx.epsilon)
            for x, weight, grad in ((query, query_weight, grads[0]), (key, key_weight, grads[1]))
        ]
        (of_query, of_query_weight), (of_key, of_key_weight) = founds
        return of_query, of_key, of_query_weight, of_key_weight, None, None, None


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, `[…, I]`."""
    return _Gated.apply(gate, up)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        from groupwise.model.fast_gpu.gate_kernel import gated_rows

        ctx.save_for_backward(gate, up)
        return gated_rows(gate, up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        from groupwise.model.fast_gpu.gate_kernel import gate_gradients

        gate, up = ctx.saved_tensors
        return gate_gradients(gate, up, grads[0])


def logprobs(logits: Tensor, targets: Tensor, temperature: Tensor | None, *, in_place: bool) -> Tensor:
    """`[M]` float32 log-probs of `targets [M]` under the rows of `logits [M, V]`, in whatever type.

    Args:
        temperature: `[M]` float32 that the logits are divided by first.
        in_place: the logits are used for nothing else, and the backward pass may write over them.
    """
    return _Logprobs.apply(logits, targets, temperature, in_place)


class _Logprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, temperature: Tensor | None, in_place: bool) -> Tensor:
        from groupwise.model.fast_gpu.scores_kernel import logprob_rows, weigh_rows
        from groupwise.model.invariant.launching import aligned

        logits = logits if logits.stride(1) == 1 and not logits.data_ptr() % 16 else aligned(logits)
        found = weigh_rows(logits, temperature)
        ctx.save_for_backward(logits, targets, temperature, found.top, found.mass)
        ctx.in_place = in_place
        return logprob_rows(logits, targets, temperature, found)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        from groupwise.model.fast_gpu.scores_kernel import Normaliser, logprob_gradients

        logits, targets, temperature, top, mass = ctx.saved_tensors
        found = Normaliser(top, mass, mass)
        of_logits = logprob_gradients(logits, targets, temperature, found, grads[0], in_place=ctx.in_place)
        if ctx.in_place:  # autograd does not see what a kernel writes, and would let a second pass read it as logits
            torch.autograd.graph.increment_version(logits)
        return of_logits, None, None, None
