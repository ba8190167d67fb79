"""Experts whose rows do not depend on their company: values, gradients, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import silu
from transformers import (
    JetMoeConfig,
    JetMoeForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
)
from transformers.models.minimax_m3_vl.modeling_minimax_m3_vl import MiniMaxM3VLExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from groupwise.errors import ConfigError
from groupwise.model.exact.experts import (
    EXPERTS_NAME,
    Places,
    check_balance_loss,
    even_experts,
    experts_of,
    make_experts_even,
)
from groupwise.model.forward.routing import routers_of
from groupwise.model.loading import wrap_model

MakeMixture = Callable[..., PreTrainedModel]
FAMILIES = ("qwen3_moe", "mixtral", "glm4_moe", "olmoe", "qwen2_moe", "granitemoe")


def layer(width: int = 64, inner: int = 36, *, dtype: torch.dtype = torch.float32) -> Qwen3MoeExperts:
    config = Qwen3MoeConfig(hidden_size=width, moe_intermediate_size=inner, num_experts=8, num_experts_per_tok=3)
    experts = Qwen3MoeExperts(config)
    generator = torch.Generator().manual_seed(0)
    for weight in experts.parameters():
        weight.data.normal_(0, 0.2, generator=generator)
    return experts.to(dtype)


def routed(tokens: int, width: int, *, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, choices of 3 of 8 experts, of which number 5 is dead, and weights."""
    generator = torch.Generator().manual_seed(1)
    scores = torch.rand(tokens, 8, generator=generator)
    scores[:, 5] = -1.0
    weights, chosen = scores.topk(3)
    return torch.randn(tokens, width, generator=generator).to(dtype), chosen, weights.to(dtype)


def by_hand(experts: Qwen3MoeExperts, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """Σ over a token's choices of weight · W_down (silu(W_gate x) * W_up x), token by token, in float64."""
    rows = []
    for x, ids, shares in zip(hidden.double(), chosen, weights.double(), strict=True):
        total = torch.zeros_like(x)
        for e, share in zip(ids.tolist(), shares, strict=True):
            gate, up = (experts.gate_up_proj[e].double() @ x).chunk(2)  # pyright: ignore[reportIndexIssue]
            total = total + share * (experts.down_proj[e].double() @ (silu(gate) * up))  # pyright: ignore[reportIndexIssue]
        rows.append(total)
    return torch.stack(rows)


def test_places_pad_each_expert_to_full_tiles() -> None:
    places = Places.of(torch.tensor([[2, 0], [2, 1]]), 4)
    assert places.ends.tolist() == [16, 32, 48, 48]
    assert places.row_of_pair.tolist() == [32, 0, 33, 16]
    real = {0: 1, 16: 3, 32: 0, 33: 2}
    assert places.pair_of_row.tolist() == [real.get(row, 4) for row in range(48)]
    assert places.token_of_row.tolist() == [real.get(row, 4) // 2 for row in range(48)]


@pytest.mark.parametrize(("width", "inner"), [(64, 36), (300, 300), (30, 35)])
def test_values_and_gradients_are_the_equations(width: int, inner: int) -> None:
    """Up to a depth of 256 by one product for all experts, beyond it by one for each, as for sizes of no alignment."""
    experts = layer(width, inner)
    hidden, chosen, weights = routed(21, width)
    hidden.requires_grad_()
    weights.requires_grad_()
    ways = torch.randn(21, width, generator=torch.Generator().manual_seed(2))
    inputs = [hidden, weights, experts.gate_up_proj, experts.down_proj]
    found = even_experts(experts, hidden, chosen, weights)
    wanted = by_hand(experts, hidden, chosen, weights)
    assert (found - wanted).norm() < 1e-6 * wanted.norm()
    for one, other in zip(
        torch.autograd.grad((found * ways).sum(), inputs),
        torch.autograd.grad((wanted * ways).sum(), inputs),
        strict=True,
    ):
        assert (one - other).norm() < 2e-6 * other.norm()
        assert other.norm() > 1
    assert not torch.autograd.grad(even_experts(experts, hidden, chosen, weights).sum(), inputs)[2][5].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_row_has_the_same_bits_in_any_company(dtype: torch.dtype, number: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        for width, inner in ((64, 36), (256, 200), *(((1024, 300),) if dtype == torch.float32 else ())):
            experts = layer(width, inner, dtype=dtype)
            hidden, chosen, weights = routed(400, width, dtype=dtype)
            with torch.no_grad():
                whole = even_experts(experts, hidden, chosen, weights)
                for count in (1, 7, 64):
                    some = even_experts(experts, hidden[-count:], chosen[-count:], weights[-count:])
                    assert torch.equal(some, whole[-count:]), (width, count)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_computes_what_transformers_does(family: str, make_mixture: MakeMixture) -> None:
    theirs = make_mixture(family)
    ours = copy.deepcopy(theirs)
    theirs.set_experts_implementation("eager")
    make_experts_even(ours)
    assert len(routers_of(ours)) == len(experts_of(ours)) == (2 if family == "glm4_moe" else 3)
    tokens = torch.randint(3, 283, (2, 19), generator=torch.Generator().manual_seed(0))
    losses = [model(tokens).logits.log_softmax(-1)[..., 7].mean() for model in (theirs, ours)]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-6)
    for loss in losses:
        loss.backward()
    for (name, one), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert one.grad is not None, name
        assert other.grad is not None, name
        assert (one.grad - other.grad).norm() <= 1e-5 * other.grad.norm(), name


def test_a_saved_mixture_is_transformers_own(make_mixture: MakeMixture, tiny_tokenizer: Any, tmp_path: Path) -> None:
    """Names, the bias of the router in its own type, and nothing of ours in config.json."""
    model = make_mixture("glm4_moe")
    bias = model.get_buffer("model.layers.1.mlp.gate.e_score_correction_bias").clone()
    assert bias.any()
    names = set(model.state_dict())
    wrap_model(model, tiny_tokenizer)
    assert model.config._experts_implementation == EXPERTS_NAME
    assert set(model.state_dict()) == names
    model.save_pretrained(tmp_path)
    assert "groupwise" not in (tmp_path / "config.json").read_text()
    again = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    kept = again.get_buffer("model.layers.1.mlp.gate.e_score_correction_bias")
    assert kept.dtype == torch.float32
    assert torch.equal(kept, bias)


SMALL: dict[str, Any] = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def own_gate(make: MakeMixture) -> PreTrainedModel:
    model = make("mixtral")
    block: Any = model.model.layers[0].mlp
    block.experts.__class__ = MiniMaxM3VLExperts
    return model


def modules(make: MakeMixture) -> PreTrainedModel:
    model = make("mixtral")
    block: Any = model.model.layers[0].mlp
    block.experts = nn.ModuleList(nn.Linear(64, 64) for _ in range(8))
    return model


UNFIT: dict[str, tuple[Callable[[MakeMixture], PreTrainedModel], str]] = {
    "not decorated": (
        lambda make: JetMoeForCausalLM(JetMoeConfig(**SMALL, num_key_value_heads=1, intermediate_size=32)),
        r"jetmoe has experts \(JetMoe\w+\) whose function cannot be chosen in transformers, so a token's log-prob",
    ),
    "a module of experts": (modules, r"mixtral has experts \(ModuleList\) whose function cannot be chosen"),
    "a gate of its own": (own_gate, r"mixtral has experts \(MiniMaxM3VLExperts\) with a gate of their own"),
    "noise": (
        lambda make: make("mixtral", router_jitter_noise=0.01),
        r"router_jitter_noise = 0\.01 in the config\.json of this mixtral: .* set it to 0 there",
    ),
    "chance": (
        lambda make: PhimoeForCausalLM(
            PhimoeConfig(**SMALL, intermediate_size=32, router_jitter_noise=0.0, input_jitter_noise=0.0)
        ),
        "phimoe draws its experts at random in training",
    ),
    "capacity": (lambda make: make("mixtral", expert_capacity=4), r"drops tokens .* \(expert_capacity\)"),
}


@pytest.mark.parametrize("name", list(UNFIT))
def test_experts_that_cannot_be_made_even_are_refused(name: str, make_mixture: MakeMixture) -> None:
    build, message = UNFIT[name]
    with pytest.raises(ConfigError, match=message):
        make_experts_even(build(make_mixture))


def test_a_balance_loss_is_for_families_that_have_one(make_mixture: MakeMixture, make_model: Any) -> None:
    check_balance_loss(make_mixture("mixtral"), 0.01)
    check_balance_loss(make_model("qwen3"), 0.0)
    with pytest.raises(
        ConfigError, match=r"router_aux_loss_coef = 0\.01: qwen3 is no mixture of experts.*leave it out"
    ):
        check_balance_loss(make_model("qwen3"), 0.01)
    with pytest.raises(ConfigError, match=r"glm4_moe has no such loss.*e_score_correction_bias"):
        check_balance_loss(make_mixture("glm4_moe"), 0.01)
