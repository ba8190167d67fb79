"""Muon, 8-bit AdamW and weight decay by name: against their equations, and through a checkpoint."""

from __future__ import annotations

import copy
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor, nn

from groupwise.checkpoint.codec import decode_state, encode_state
from groupwise.config import OptimConfig
from groupwise.errors import ConfigError
from groupwise.policy.optimizer import MasterOptimizer

NEEDS_BITSANDBYTES = pytest.mark.skipif(
    find_spec("bitsandbytes") is None, reason="needs bitsandbytes: pip install 'groupwise[lowbit]'"
)
NAMES = ["adamw", "muon", pytest.param("adamw_8bit", marks=NEEDS_BITSANDBYTES)]


class Net(nn.Module):
    """An embedding, matrices large enough for 8-bit moments, a norm and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 64)
        self.up = nn.Linear(64, 96)
        self.norm = nn.LayerNorm(96)
        self.down = nn.Linear(96, 64, bias=False)
        self.head = nn.Linear(64, 32, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.down(self.norm(self.up(self.embed(tokens))).tanh()))


def net(dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(0)
    return Net().to(dtype)


def optim(**settings: object) -> OptimConfig:
    return OptimConfig.model_validate({"lr": 0.01, **settings})


def optimizer(module: Net, **settings: object) -> MasterOptimizer:
    return MasterOptimizer(module, optim(**settings), ends=[module.embed.weight, module.head.weight])


def backward(module: Net, seed: int) -> None:
    tokens = torch.randint(0, 32, (96,), generator=torch.Generator().manual_seed(seed))
    module(tokens).square().sum().backward()


def orthogonalised(update: Tensor) -> Tensor:
    """Jordan et al. 2024: five Newton-Schulz steps of the quintic with these coefficients, in bfloat16."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = update.bfloat16()
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / x.norm()
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.T if tall else x).float()


def test_muon_by_its_equations_on_the_hidden_matrices_alone() -> None:
    module = net()
    twin = net()
    mine = optimizer(module, name="muon", momentum=0.9, weight_decay=0.1)
    adam = MasterOptimizer(twin, optim(weight_decay=0.1))
    weight, momentum = module.down.weight.detach().clone(), torch.zeros(64, 96)
    for step in range(3):
        backward(module, step)
        twin.load_state_dict(module.state_dict())
        for p, q in zip(module.parameters(), twin.parameters(), strict=True):
            assert p.grad is not None
            q.grad = p.grad.clone()
        grad = module.down.weight.grad
        assert grad is not None
        momentum = 0.9 * momentum + 0.1 * grad
        update = orthogonalised(0.1 * grad + 0.9 * momentum)
        weight = weight * (1 - 0.01 * 0.1) - 0.01 * 0.2 * 96**0.5 * update
        mine.step(0.01)
        adam.step(0.01)
        assert float((module.down.weight - weight).norm() / weight.norm()) < 1e-2  # bfloat16, in another order
        weight = module.down.weight.detach().clone()
        for name in ("embed.weight", "up.bias", "norm.weight", "norm.bias", "head.weight"):
            assert torch.equal(module.get_parameter(name), twin.get_parameter(name)), name
        assert not torch.equal(module.down.weight, twin.down.weight)
    moments = mine.state_dict()["moments"]
    assert {name for name, state in moments.items() if "momentum_buffer" in state} == {"up.weight", "down.weight"}


def test_muons_updates_are_of_adamws_size() -> None:
    module = net()
    before = module.up.weight.detach().clone()
    mine = optimizer(module, name="muon")
    backward(module, 0)
    mine.step(0.01)
    rms = float((module.up.weight - before).square().mean().sqrt())
    assert 0.3 * 0.2 * 0.01 < rms < 1.5 * 0.2 * 0.01  # 32 tokens fill half of the matrix's rank


@NEEDS_BITSANDBYTES
def test_eight_bit_moments_are_near_adamw_and_small() -> None:
    ours, theirs = net(), net()
    eight, full = optimizer(ours, name="adamw_8bit"), optimizer(theirs)
    before = theirs.up.weight.detach().clone()
    for step in range(5):
        for each, its in ((ours, eight), (theirs, full)):
            backward(each, step)
            its.step(0.01)
    moved = (theirs.up.weight - before).norm()
    assert float((ours.up.weight - theirs.up.weight).norm() / moved) < 0.2
    moments = eight.state_dict()["moments"]["up.weight"]
    assert moments["state1"].dtype is torch.uint8
    assert moments["state1"].shape == (96, 64)
    assert eight.state_dict()["moments"]["norm.weight"]["state1"].dtype is torch.float32
    assert eight.bytes_to_come < full.bytes_to_come * 0.6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_every_optimiser_goes_on_bitwise_after_a_checkpoint(name: str, dtype: torch.dtype) -> None:
    module = net(dtype)
    mine = optimizer(module, name=name, weight_decay=0.1)
    for step in range(3):
        backward(module, step)
        mine.step(0.003)
    encoded = encode_state(mine.state_dict(), "optimizer")
    state = decode_state(copy.deepcopy(encoded.structure), {k: t.clone() for k, t in encoded.tensors.items()})
    torch.manual_seed(99)
    other = Net().to(dtype)
    restored = optimizer(other, name=name, weight_decay=0.1)
    restored.load_state_dict(state)
    for step in range(3, 6):
        for each, its in ((module, mine), (other, restored)):
            backward(each, step)
            its.step(0.003)
    for parameter, twin in zip(module.parameters(), other.parameters(), strict=True):
        assert torch.equal(parameter, twin)
    for parameter, master in mine.masters().items():
        assert torch.equal(master, restored.masters()[parameter]), parameter


@pytest.mark.parametrize("name", NAMES)
def test_weight_decay_goes_by_name_and_the_first_match_wins(name: str) -> None:
    module = net()
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    groups = {"embed.*": 0.0, "norm.*": 0.2, "*.bias": 0.3, "up.*": 0.4}
    mine = optimizer(module, name=name, weight_decay=0.1, weight_decay_groups=groups)
    mine.step(0.5)  # without gradients only decay acts
    expected = {
        "embed.weight": 0.0,
        "up.weight": 0.4,
        "up.bias": 0.3,
        "norm.weight": 0.2,
        "norm.bias": 0.2,
        "down.weight": 0.1,
        "head.weight": 0.1,
    }
    for n, p in module.named_parameters():
        torch.testing.assert_close(p.detach(), before[n] * (1 - 0.5 * expected[n]), rtol=1e-5, atol=1e-7)


def test_a_pattern_that_matches_nothing_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"'embd\.\*' matches no trained parameter; their names are like embed\.weight"
    ):
        optimizer(net(), weight_decay_groups={"embd.*": 0.0})


def test_a_module_of_matrices_alone_needs_no_adamw() -> None:
    module = nn.Linear(4, 4, bias=False)
    mine = MasterOptimizer(module, optim(name="muon"))
    before = module.weight.detach().clone()
    module(torch.randn(2, 4)).sum().backward()
    mine.step(0.1)
    assert not torch.equal(module.weight, before)


def test_memory_to_come_is_that_of_gradients_and_moments() -> None:
    module = net()
    sizes = {n: p.numel() for n, p in module.named_parameters()}
    everything, hidden = sum(sizes.values()), sizes["up.weight"] + sizes["down.weight"]
    assert optimizer(module).bytes_to_come == 12 * everything
    assert optimizer(module, name="muon").bytes_to_come == 12 * everything - 4 * hidden


def test_gradients_are_described_finite_or_not() -> None:
    module = net()
    mine = optimizer(module)
    backward(module, 0)
    grad = module.up.weight.grad
    assert grad is not None
    norm = float(grad.norm())
    assert mine.gradients()["up.weight"].norm == pytest.approx(norm)
    assert mine.gradients()["up.weight"].num_bad == 0
    grad[0, 0], grad[1, 1] = torch.nan, torch.inf
    assert not torch.isfinite(torch.tensor(mine.clip(1.0)))
    found = mine.gradients()  # as they were: clipping by such a norm would have made them all NaN or zero
    assert found["up.weight"].num_bad == 2
    assert 0 < found["up.weight"].norm <= norm
    assert found["down.weight"].num_bad == 0
    assert found["down.weight"].norm > 0
