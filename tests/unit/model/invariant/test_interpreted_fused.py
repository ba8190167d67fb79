"""Fused layers of a GPU: the values and gradients of the modules' operations, and the same bits in any company."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from .values import random


def close(mine: Tensor, wanted: Tensor, steps: float = 2.0) -> None:
    """Within so many roundings of the result's type; the interpreter cuts bits off."""
    tolerance = 2e-5 if mine.dtype == torch.float32 else steps * 2**-7
    torch.testing.assert_close(mine.double(), wanted.double(), rtol=tolerance, atol=tolerance)


def gradients(outs: tuple[Tensor, ...], leaves: list[Tensor], seed: int = 9) -> tuple[Tensor, ...]:
    grads = [random(*out.shape, dtype=out.dtype, seed=seed + i) for i, out in enumerate(outs)]
    return torch.autograd.grad(outs, leaves, grads)


def wide(leaves: list[Tensor]) -> list[Tensor]:
    return [leaf.detach().double().requires_grad_() for leaf in leaves]


@pytest.mark.parametrize("size", [16, 92, 3000])
@pytest.mark.parametrize("adds", [True, False])
def test_add_norm(size: int, adds: bool, dtype: torch.dtype) -> None:
    from groupwise.model.fast_gpu.layers import add_norm, norm

    fresh, residual = (random(37, size, dtype=dtype, seed=i).requires_grad_() for i in range(2))
    weight = (1 + random(size, dtype=dtype, seed=2) / 4).requires_grad_()
    leaves = [fresh, residual, weight] if adds else [fresh, weight]

    def wanted(*leaves: Tensor) -> tuple[Tensor, ...]:
        whole = (leaves[0] + leaves[1]) if adds else leaves[0]
        unit = whole * torch.rsqrt(whole.square().mean(-1, keepdim=True) + 1e-6)
        return (whole, leaves[-1] * unit) if adds else (leaves[-1] * unit,)

    outs = add_norm(fresh, residual, weight, 1e-6) if adds else (norm(fresh, weight, 1e-6),)
    doubles = wide(leaves)
    exact = wanted(*doubles)
    for mine, theirs in zip(outs, exact, strict=True):
        close(mine.detach(), theirs.detach(), 3)
    for mine, theirs in zip(gradients(outs, leaves), gradients(exact, doubles), strict=True):
        scale = float(theirs.abs().max())
        close(mine / scale, theirs / scale, 4)
    for rows in (slice(0, 1), slice(3, 9), slice(36, 37)):
        some = add_norm(fresh[rows], residual[rows], weight, 1e-6) if adds else (norm(fresh[rows], weight, 1e-6),)
        assert all(torch.equal(part, whole[rows]) for part, whole in zip(some, outs, strict=True))


@pytest.mark.parametrize(("heads", "few", "size"), [(4, 2, 16), (3, 1, 24), (2, 2, 64)])
@pytest.mark.parametrize("norms", [True, False])
@pytest.mark.parametrize("joined", [True, False])
def test_heads_are_normed_and_turned(
    heads: int, few: int, size: int, norms: bool, joined: bool, dtype: torch.dtype
) -> None:
    from groupwise.model.fast_gpu.layers import turned

    count = 32
    if joined:
        whole = random(count, (heads + 2 * few) * size, dtype=dtype).requires_grad_()
        cut = [heads * size, few * size, few * size]
        query, key = (part.unflatten(-1, (-1, size)) for part in whole.split(cut, -1)[:2])
        leaves = [whole]
    else:
        query, key = (random(count, n, size, dtype=dtype, seed=i).requires_grad_() for i, n in enumerate((heads, few)))
        leaves = [query, key]
    weights = [(1 + random(size, dtype=dtype, seed=5 + i) / 4).requires_grad_() for i in range(2)]
    angle = torch.rand(count, size // 2, generator=torch.Generator().manual_seed(3)) * 6
    cos, sin = torch.cat([angle.cos()] * 2, -1).to(dtype), torch.cat([-angle.sin(), angle.sin()], -1).to(dtype)

    def wanted(query: Tensor, key: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        outs: list[Tensor] = []
        for x, weight in zip((query, key), weights if norms else (None, None), strict=True):
            if weight is not None:
                x = weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))
            outs.append(x * cos.double()[:, None] + x.roll(size // 2, -1) * sin.double()[:, None])
        return tuple(outs)

    outs = turned(query, key, (weights[0], weights[1]) if norms else None, cos, sin, 1e-6)
    doubles = wide([query, key, *weights])
    exact = wanted(*doubles)
    for mine, theirs in zip(outs, exact, strict=True):
        close(mine.detach(), theirs.detach(), 4)
    trained = weights if norms else []
    found = gradients(outs, [*leaves, *trained])
    of = gradients(exact, doubles[: 2 + len(trained)])
    if joined:
        nothing = torch.zeros(count, few * size, dtype=torch.float64)
        of = (torch.cat([of[0].flatten(1), of[1].flatten(1), nothing], -1), *of[2:])
    for mine, theirs in zip(found, of, strict=True):
        scale = float(theirs.abs().max())
        close(mine / scale, theirs / scale, 4)
    some = turned(query[16:], key[16:], (weights[0], weights[1]) if norms else None, cos[16:], sin[16:], 1e-6)
    assert all(torch.equal(part, whole[16:]) for part, whole in zip(some, outs, strict=True))


@pytest.mark.parametrize("size", [64, 92, 1500])
@pytest.mark.parametrize("joined", [True, False])
def test_gate(size: int, joined: bool, dtype: torch.dtype) -> None:
    from groupwise.model.fast_gpu.layers import gated

    whole = (random(7, 2 * size, dtype=dtype) * 3).requires_grad_()
    gate, up = whole.split(size, -1)
    out = gated(gate, up) if joined else gated(gate.contiguous(), up.contiguous())
    (double,) = wide([whole])
    parts = double.split(size, -1)
    exact = torch.nn.functional.silu(parts[0]) * parts[1]
    close(out.detach(), exact.detach(), 3)
    close(gradients((out,), [whole])[0], gradients((exact,), [double])[0], 4)
    assert torch.equal(gated(gate[3:5], up[3:5]), out[3:5])


@pytest.mark.parametrize("vocabulary", [5, 283, 5000])
@pytest.mark.parametrize("temperature", [None, 0.7])
def test_log_probs(vocabulary: int, temperature: float | None, dtype: torch.dtype) -> None:
    from groupwise.model.fast_gpu.layers import logprobs

    logits = (random(9, vocabulary, dtype=dtype) * 4).requires_grad_()
    targets = torch.randint(vocabulary, (9,), generator=torch.Generator().manual_seed(1))
    divisor = None if temperature is None else torch.full((9,), temperature)
    found = logprobs(logits, targets, divisor, in_place=False)
    assert found.dtype == torch.float32
    (double,) = wide([logits])
    exact = (double / (temperature or 1.0)).log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    torch.testing.assert_close(found.detach().double(), exact.detach(), rtol=1e-5, atol=1e-5)
    grad = random(9, dtype=torch.float32, seed=4)
    (mine,) = torch.autograd.grad(found, logits, grad)
    (theirs,) = torch.autograd.grad(exact, double, grad.double())
    close(mine, theirs, 2)
    some = logprobs(logits[2:5], targets[2:5], None if divisor is None else divisor[2:5], in_place=False)
    # A slice may begin anywhere; what the model computes begins at a multiple of 16 bytes.
    assert torch.equal(some, found[2:5])


def test_a_second_backward_pass_over_what_the_first_wrote_over_is_refused() -> None:
    from groupwise.model.fast_gpu.layers import logprobs

    leaf = random(4, 64, dtype=torch.float32).requires_grad_()
    found = logprobs(leaf * 1.0, torch.arange(4), None, in_place=True).sum()
    found.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        found.backward()


@pytest.mark.parametrize("vocabulary", [5, 283, 5000])
def test_tokens_are_those_of_the_inverse_distribution(vocabulary: int, dtype: torch.dtype) -> None:
    from groupwise.model.fast_gpu.scores_kernel import logprob_rows, pick_tokens

    logits = random(64, vocabulary, dtype=dtype) * 4
    logits[3, 1:] = -torch.inf
    uniform = torch.rand(64, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    uniform[:2] = torch.tensor([0.0, np.nextafter(1.0, 0.0)])
    temperature = torch.tensor([0.0, 0.5, 1.0, 2.0] * 16)
    tokens, found = pick_tokens(logits, uniform, temperature, any_greedy=True)
    divisor = torch.where(temperature > 0, temperature, 1.0)[:, None].double()
    exact = (logits.double() / divisor).softmax(-1)
    upto = exact.cumsum(-1)
    greedy = temperature == 0
    assert torch.equal(tokens[greedy], logits[greedy].float().argmax(-1))
    below = torch.where(tokens > 0, upto.gather(-1, (tokens - 1).clamp(min=0)[:, None])[:, 0], 0.0)
    above = upto.gather(-1, tokens[:, None])[:, 0]
    right = (below <= uniform + 1e-6) & (uniform <= above + 1e-6)
    assert bool(right[~greedy].all())
    assert bool((exact.gather(-1, tokens[:, None]) > 0).all())
    mine = logprob_rows(logits, tokens, temperature, found)
    wanted = exact.gather(-1, tokens[:, None])[:, 0].log()
    torch.testing.assert_close(mine.double(), wanted, rtol=1e-5, atol=1e-5)
    again, _ = pick_tokens(logits[8:24].clone(), uniform[8:24], temperature[8:24], any_greedy=True)
    assert torch.equal(again, tokens[8:24])
