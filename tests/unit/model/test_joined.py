"""Weights side by side in memory stay parameters of their own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from groupwise.model.fast_cpu.lean_layers import join_products, make_layers_lean
from groupwise.model.fast_gpu.joined import Joined, join, joined_of


class Owner(nn.Module):
    def __init__(self, *, bias: bool = False, others: int = 6) -> None:
        super().__init__()
        self.first = nn.Linear(6, 4, bias=bias)
        self.second = nn.Linear(others, 3, bias=bias)

    @property
    def layers(self) -> list[nn.Linear]:
        return [self.first, self.second]


def test_one_product_is_that_of_the_parts_after_updates_too() -> None:
    for bias in (False, True):
        owner = Owner(bias=bias)
        before = copy.deepcopy(owner.state_dict())
        join(owner, owner.layers)
        joined = joined_of(owner, owner.layers)
        assert isinstance(joined, Joined)
        assert owner.state_dict().keys() == before.keys()
        assert all(torch.equal(value, before[name]) for name, value in owner.state_dict().items())
        optimizer = torch.optim.AdamW(owner.parameters(), lr=0.1, foreach=True)
        x = torch.randn(5, 6)
        sum(layer(x).square().sum() for layer in owner.layers).backward()  # type: ignore[union-attr]
        optimizer.step()
        assert not torch.equal(owner.first.weight, before["first.weight"])
        assert joined_of(owner, owner.layers) is joined
        wanted = torch.cat([layer(x) for layer in owner.layers], -1)
        torch.testing.assert_close(joined(x), wanted)
        owner.load_state_dict(before)
        torch.testing.assert_close(joined(x)[:, :4], nn.functional.linear(x, before["first.weight"], owner.first.bias))


def test_what_is_not_alike_or_replaced_is_not_joined() -> None:
    unlike = Owner(others=5)
    join(unlike, unlike.layers)
    assert joined_of(unlike, unlike.layers) is None
    for change in (
        lambda owner: owner.double(),
        lambda owner: setattr(owner.first, "weight", nn.Parameter(owner.first.weight.clone())),
        lambda owner: setattr(owner.first, "__class__", type("Other", (nn.Linear,), {})),
    ):
        owner = Owner()
        join(owner, owner.layers)
        assert joined_of(owner, owner.layers) is not None
        change(owner)
        assert joined_of(owner, owner.layers) is None
    owner = Owner()
    join(owner, owner.layers)
    assert joined_of(copy.deepcopy(owner), copy.deepcopy(owner).layers) is None


def test_a_joined_model_is_saved_and_loaded_as_any(make_model: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    model = make_model("qwen3")
    make_layers_lean(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    join_products(model)
    decoder: Any = model.get_decoder()
    attention = decoder.layers[0].self_attn
    assert joined_of(attention, [attention.q_proj, attention.k_proj, attention.v_proj]) is not None
    model.save_pretrained(str(tmp_path))
    again = AutoModelForCausalLM.from_pretrained(str(tmp_path))
    found = again.state_dict()
    assert found.keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in found.items())
