"""Products, norms and sums: their values, and the same bits for a row in any company."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from .values import random


def close(mine: Tensor, wanted: Tensor) -> None:
    """Within the rounding of the result's type."""
    tolerance = 1e-5 if mine.dtype == torch.float32 else 2**-7  # the interpreter cuts bits off
    torch.testing.assert_close(mine.double(), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("n", "k"), [(92, 64), (64, 92), (3, 64), (64, 3), (130, 200), (128, 128)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_product(n: int, k: int, has_bias: bool, dtype: torch.dtype) -> None:
    from groupwise.model.invariant.matmul_kernel import product

    x, weight = random(130, k, dtype=dtype), random(n, k, dtype=dtype, seed=1) / k**0.5
    bias = random(n, dtype=dtype, seed=2) if has_bias else None
    whole = product(x, weight, bias)
    close(whole, x.double() @ weight.double().t() + (0 if bias is None else bias.double()))
    for rows in (slice(0, 1), slice(1, 2), slice(5, 69), slice(64, 130), slice(129, 130)):
        assert torch.equal(product(x[rows], weight, bias), whole[rows])
    assert torch.equal(product(x.view(2, 65, k), weight, bias), whole.view(2, 65, n))
    assert product(x[:0], weight, bias).shape == (0, n)
    spoiled = x.clone()
    spoiled[7] = torch.inf
    assert torch.equal(product(spoiled, weight, bias)[:7], whole[:7])


@pytest.mark.parametrize("size", [16, 64, 92, 3000])
@pytest.mark.parametrize("unit_offset", [True, False])
def test_norm(size: int, unit_offset: bool, dtype: torch.dtype) -> None:
    from groupwise.model.fast_gpu.norm_kernel import add_norm_rows

    x, weight = random(37, size, dtype=dtype) * 3, random(size, dtype=dtype, seed=1)
    whole = add_norm_rows(x, None, weight, 1e-6, unit_offset=unit_offset)[1]
    unit = x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + 1e-6)
    if not unit_offset:
        unit = unit.to(dtype).double()
    tolerance = 2e-5 if dtype == torch.float32 else 2**-6  # two roundings, cut off
    torch.testing.assert_close(whole.double(), unit * (weight.double() + unit_offset), rtol=tolerance, atol=1e-5)
    for rows in (slice(0, 1), slice(3, 9), slice(36, 37)):
        again = add_norm_rows(x[rows], None, weight, 1e-6, unit_offset=unit_offset)[1]
        assert torch.equal(again, whole[rows])


@pytest.mark.parametrize("size", [5, 128, 283, 4096, 9001])
def test_row_sums(size: int) -> None:
    from groupwise.model.invariant.rows_kernel import sum_rows

    x = random(6, size, dtype=torch.float32).exp()
    whole = sum_rows(x)
    close(whole, x.double().sum(-1))
    for row in range(6):
        assert torch.equal(sum_rows(x[row : row + 1]), whole[row : row + 1])


def test_gradient_of_sums_products_and_norms() -> None:
    from torch import nn
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm

    from groupwise.model.invariant.linear import InvariantLinear
    from groupwise.model.invariant.norms import InvariantGemmaNorm
    from groupwise.model.invariant.sums import fixed_row_sums

    linear, twin = nn.Linear(24, 10), nn.Linear(24, 10)
    twin.load_state_dict(linear.state_dict())
    twin.__class__ = InvariantLinear
    gemma = Gemma3RMSNorm(24)
    gemma.weight.data = random(24, dtype=torch.float32, seed=5)
    other = Gemma3RMSNorm(24)
    other.weight.data = gemma.weight.data.clone()
    pairs = [
        (linear, twin),
        (gemma, InvariantGemmaNorm(other)),
    ]
    for theirs, mine in pairs:
        found = []
        for module in (theirs, mine):
            x = random(2, 7, 24, dtype=torch.float32, seed=6).requires_grad_()
            out = module(x)
            weights = random(*out.shape, dtype=torch.float32, seed=7)
            found.append([out, *torch.autograd.grad((out * weights).sum(), [x, *module.parameters()])])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)
    x = random(3, 50, dtype=torch.float32).requires_grad_()
    (grad,) = torch.autograd.grad((fixed_row_sums(x) * torch.tensor([1.0, 2.0, -3.0])).sum(), x)
    assert torch.equal(grad, torch.tensor([1.0, 2.0, -3.0])[:, None].expand(3, 50))
