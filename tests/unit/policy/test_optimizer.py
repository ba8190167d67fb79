"""The optimiser against torch's own AdamW, and what float32 masters are for."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from groupwise.checkpoint.codec import decode_state, encode_state
from groupwise.config import OptimConfig
from groupwise.policy.optimizer import MasterOptimizer


class Net(nn.Module):
    """Two matrices, a bias, a norm, and an output layer that may share the first matrix."""

    def __init__(self, *, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 6, bias=False)
        self.norm = nn.LayerNorm(6)
        self.mid = nn.Linear(6, 6)
        self.out = nn.Linear(6, 6, bias=False)
        if tied:
            self.out.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.norm(self.mid(self.embed(x))).tanh())


def optim(**settings: object) -> OptimConfig:
    return OptimConfig.model_validate({"lr": 0.01, **settings})


def net(*, tied: bool = False, dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(0)
    return Net(tied=tied).to(dtype)


def backward(module: nn.Module, seed: int, scale: float = 1.0) -> None:
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(seed)).to(next(module.parameters()).dtype)
    (module(x).square().sum() * scale).backward()


def test_float32_equals_torch_adamw_step_by_step() -> None:
    ours, theirs = net(), net()
    config = optim(weight_decay=0.1, betas=[0.8, 0.95], eps=1e-6)
    mine = MasterOptimizer(ours, config)
    matrices = [p for p in theirs.parameters() if p.dim() >= 2]
    vectors = [p for p in theirs.parameters() if p.dim() < 2]
    reference = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=0.01,
        betas=(0.8, 0.95),
        eps=1e-6,
    )
    for step in range(6):
        rate = 0.01 / (step + 1)
        for group in reference.param_groups:
            group["lr"] = rate
        backward(ours, step)
        backward(theirs, step)
        mine.step(rate)
        reference.step()
        reference.zero_grad()
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_adamw_by_the_papers_equations() -> None:
    layer = nn.Linear(1, 1, bias=False)
    layer.weight.data.fill_(2.0)
    mine = MasterOptimizer(layer, optim(weight_decay=0.5, betas=[0.9, 0.99], eps=1e-8))
    theta, m, v = 2.0, 0.0, 0.0
    for t in range(1, 4):
        gradient = 3.0 * t
        layer.weight.grad = torch.full((1, 1), gradient)
        mine.step(0.1)
        m, v = 0.9 * m + 0.1 * gradient, 0.99 * v + 0.01 * gradient**2
        theta -= 0.1 * (m / (1 - 0.9**t)) / ((v / (1 - 0.99**t)) ** 0.5 + 1e-8) + 0.1 * 0.5 * theta
        assert layer.weight.item() == pytest.approx(theta, rel=1e-6)


def test_decay_shrinks_matrices_alone() -> None:
    module = net()
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    MasterOptimizer(module, optim(weight_decay=0.5)).step(0.1)  # without gradients only decay acts
    for name, p in module.named_parameters():
        factor = 1 - 0.1 * 0.5 if name in ("embed.weight", "mid.weight", "out.weight") else 1.0
        torch.testing.assert_close(p.detach(), before[name] * factor, rtol=1e-6, atol=0)


def test_small_updates_of_bfloat16_weights_add_up_in_their_masters() -> None:
    module = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    module.weight.data.fill_(0.5)
    mine = MasterOptimizer(module, optim())
    for _ in range(2000):
        module(torch.ones(1, 1, dtype=torch.bfloat16)).sum().backward()
        mine.step(1e-6)  # bfloat16 around 0.5 moves in steps of 0.002 or more
    assert mine.state_dict()["masters"]["weight"].item() == pytest.approx(0.498, abs=1e-4)
    assert module.weight.item() == pytest.approx(0.498, abs=2e-3)
    assert module.weight.item() < 0.5
    assert module.weight.dtype is torch.bfloat16


def test_bfloat16_gradients_add_up_in_float32() -> None:
    module = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    mine = MasterOptimizer(module, optim())
    for value in (256.0, 1.0, 1.0, 1.0):  # 256 + 1 is 256 in bfloat16
        module(torch.full((1, 1), value, dtype=torch.bfloat16)).sum().backward()
    assert mine.clip(0) == 259.0


def test_masters_are_float32_and_start_at_the_weights() -> None:
    module = net(dtype=torch.bfloat16)
    masters = MasterOptimizer(module, optim()).state_dict()["masters"]
    for name, p in module.named_parameters():
        assert masters[name].dtype is torch.float32
        assert torch.equal(masters[name], p.float())


def test_float32_weights_are_their_own_masters() -> None:
    module = net()
    masters = MasterOptimizer(module, optim()).state_dict()["masters"]
    assert all(masters[name].data_ptr() == p.data_ptr() for name, p in module.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_clipping_returns_the_norm_before_and_bounds_it(dtype: torch.dtype) -> None:
    module = net(dtype=dtype)
    mine = MasterOptimizer(module, optim())
    backward(module, 1, scale=100.0)
    norm = mine.clip(0)
    assert norm > 1
    assert mine.clip(0.25) == pytest.approx(norm)
    assert mine.clip(0) == pytest.approx(0.25, rel=1e-3)
    assert mine.clip(10.0) == pytest.approx(0.25, rel=1e-3)  # below the bound nothing changes
    assert mine.clip(0) == pytest.approx(0.25, rel=1e-3)


def test_norm_without_gradients_is_zero() -> None:
    assert MasterOptimizer(net(), optim()).clip(1.0) == 0.0


def test_norm_of_an_infinite_gradient_is_not_finite() -> None:
    module = net()
    mine = MasterOptimizer(module, optim())
    backward(module, 0)
    module.mid.weight.grad = torch.full_like(module.mid.weight, torch.inf)
    assert not torch.isfinite(torch.tensor(mine.clip(0)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tied_weights_are_one_parameter(dtype: torch.dtype) -> None:
    module = net(tied=True, dtype=dtype)
    mine = MasterOptimizer(module, optim())
    assert list(mine.state_dict()["masters"]) == ["embed.weight", "norm.weight", "norm.bias", "mid.weight", "mid.bias"]
    backward(module, 2)
    reference = net(tied=True)
    backward(reference, 2)
    expected = torch.nn.utils.get_total_norm([p.grad for p in reference.parameters() if p.grad is not None])
    assert mine.clip(0) == pytest.approx(float(expected), rel=1e-5 if dtype is torch.float32 else 0.1)
    mine.step(0.1)
    assert torch.equal(module.embed.weight, module.out.weight)


def test_frozen_parameters_stay() -> None:
    module = net()
    module.mid.weight.requires_grad_(False)
    before = module.mid.weight.detach().clone()
    mine = MasterOptimizer(module, optim(weight_decay=0.5))
    backward(module, 0)
    mine.step(0.1)
    assert torch.equal(module.mid.weight, before)
    assert "mid.weight" not in mine.state_dict()["masters"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_survives_a_checkpoint_bitwise(dtype: torch.dtype) -> None:
    module = net(dtype=dtype)
    mine = MasterOptimizer(module, optim(weight_decay=0.1))
    for step in range(3):
        backward(module, step)
        mine.step(0.003)
    encoded = encode_state(mine.state_dict(), "optimizer")
    state = decode_state(copy.deepcopy(encoded.structure), {k: t.clone() for k, t in encoded.tensors.items()})
    torch.manual_seed(99)
    other = Net().to(dtype)
    restored = MasterOptimizer(other, optim(weight_decay=0.1))
    restored.load_state_dict(state)
    for step in range(3, 6):
        for each, its in ((module, mine), (other, restored)):
            backward(each, step)
            its.step(0.003)
    for a, b in zip(module.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    for name, master in mine.state_dict()["masters"].items():
        assert torch.equal(master, restored.state_dict()["masters"][name])


def test_state_before_the_first_update_can_be_loaded() -> None:
    module, other = net(), Net()
    MasterOptimizer(other, optim()).load_state_dict(MasterOptimizer(module, optim()).state_dict())
    assert torch.equal(module.mid.weight, other.mid.weight)
