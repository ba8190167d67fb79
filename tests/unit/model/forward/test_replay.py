"""Experts that a sampler chose, replayed: values and gradients against each family's equations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from groupwise.batches import TrainingRow
from groupwise.errors import ConfigError
from groupwise.inputs import ModelInput
from groupwise.model.forward.mixture import mixture_of
from groupwise.model.forward.packing import Packed, pack
from groupwise.model.forward.recompute import recompute_layers
from groupwise.model.forward.routing import Choices, Routing, routers_of
from groupwise.model.loading import LoadedModel, wrap_model
from groupwise.sides import Mixture, Routes, Sides

MakeMixture = Callable[..., PreTrainedModel]
FAMILIES = ("qwen3_moe", "mixtral", "olmoe", "glm4_moe", "qwen2_moe", "granitemoe")
PROMPT = (5, 9, 11, 40)


def sizes(family: str) -> tuple[int, int, int]:
    """Layers with experts, experts, choices."""
    return (
        2 if family == "glm4_moe" else 3,
        8 if family in ("mixtral", "granitemoe") else 16,
        {
            "mixtral": 2,
            "granitemoe": 2,
        }.get(family, 4),
    )


def forced(family: str, tokens: int, seed: int) -> Tensor:
    """Any k distinct experts for each token and layer, `[tokens, L, k]`."""
    layers, experts, k = sizes(family)
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(tokens, layers, experts, generator=generator).argsort(-1)[..., :k]


def row_of(tokens: tuple[int, ...], ids: Tensor | None, *, group: int = 0, prompt: tuple[int, ...] = PROMPT) -> Any:
    sides = Sides()
    if ids is not None:
        data = bytes(ids[: len(prompt) + len(tokens) - 1].flatten().tolist())
        sides = Sides(routes=Routes(data, "uint8", ids.shape[1], ids.shape[2]))
    zeros = (0.0,) * len(tokens)
    ones = (1,) * len(tokens)
    return TrainingRow(group, ModelInput.of(prompt), ModelInput.of(tokens), ones, zeros, zeros, sides=sides)


def shares(family: str, logits: Tensor, ids: Tensor, config: Any) -> Tensor:
    """What each chosen expert is weighed by, as the model's paper has it."""
    picked = logits.gather(-1, ids)
    if family == "granitemoe":  # softmax over the chosen
        return picked.softmax(-1)
    if family == "glm4_moe":  # DeepSeek-V3 (arXiv:2412.19437), equations 13 to 15: the bias is for the choice alone
        scores = picked.sigmoid()
        return config.routed_scaling_factor * scores / scores.sum(-1, keepdim=True)
    probs = logits.exp() / logits.exp().sum(-1, keepdim=True)
    found = probs.gather(-1, ids)
    if family == "mixtral" or config.norm_topk_prob:
        found = found / found.sum(-1, keepdim=True)
    return found


def by_equations(family: str, model: Any, ids: Tensor, tokens: list[int], *, first: int) -> Tensor:
    """Log-probs of the tokens from `first` on, by transformers' model whose routers are hooked."""
    hooks = []
    routers = [m for m in model.modules() if type(m).__name__.lower().endswith("topkrouter")]
    assert len(routers) == ids.shape[1]
    for layer, router in enumerate(routers):

        def hook(module: nn.Module, args: Any, output: Any, layer: int = layer) -> Any:
            logits = output[0]
            chosen = ids[: len(logits), layer]
            return logits, shares(family, logits.double(), chosen, model.config).to(output[1].dtype), chosen

        hooks.append(router.register_forward_hook(hook))
    try:
        logits = model(torch.tensor([tokens[:-1]])).logits[0].double()
    finally:
        for handle in hooks:
            handle.remove()
    return logits.log_softmax(-1)[first - 1 :].gather(-1, torch.tensor(tokens[first:])[:, None])[:, 0]


def plain_model(model: PreTrainedModel) -> PreTrainedModel:
    """As transformers computes it, expert by expert."""
    model.set_experts_implementation("eager")
    return model.eval()


def scored(loaded: LoadedModel, packed: Packed, *, as_sampled: bool = True) -> tuple[Tensor, Routing]:
    routing = Routing.of(packed, torch.ones(len(packed.targets)))
    return loaded.scoring(packed, routing=routing, as_sampled=as_sampled).logprobs, routing


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_replayed_forward_is_that_of_the_equations(
    make_mixture: MakeMixture, tiny_tokenizer: Any, family: str, dtype: torch.dtype
) -> None:
    tokens = (8, 77, 130, 4, 200, 31)
    ids = forced(family, 32, 1)
    loaded = wrap_model(make_mixture(family, dtype=dtype), tiny_tokenizer)
    plain = plain_model(make_mixture(family, dtype=dtype))
    with torch.no_grad():
        found, _ = scored(loaded, pack([row_of(tokens, ids)]))
        wanted = by_equations(family, plain, ids, [*PROMPT, *tokens], first=len(PROMPT))
        alone, _ = scored(loaded, pack([row_of(tokens, ids)]), as_sampled=False)
    close = 2e-5 if dtype == torch.float32 else 0.06
    assert float((found.double() - wanted).abs().max()) < close
    assert float((alone.double() - wanted).abs().max()) > 4 * close, "and its own choices are others"


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_the_equations_for_routers_too(
    make_mixture: MakeMixture, tiny_tokenizer: Any, family: str
) -> None:
    tokens = (8, 77, 130, 4, 200, 31)
    ids = forced(family, 32, 2)
    loaded = wrap_model(make_mixture(family), tiny_tokenizer)
    plain = plain_model(make_mixture(family))
    found, _ = scored(loaded, pack([row_of(tokens, ids)]))
    found.sum().backward()
    by_equations(family, plain, ids, [*PROMPT, *tokens], first=len(PROMPT)).sum().backward()
    wanted = dict(plain.named_parameters())
    seen = 0
    for name, weight in loaded.model.named_parameters():
        grad = wanted[name].grad
        if grad is None:
            continue
        assert weight.grad is not None, name
        torch.testing.assert_close(weight.grad, grad, rtol=2e-3, atol=2e-4 * float(grad.abs().max()) + 1e-6)
        seen += name.endswith(".gate.weight") or ".router." in name
    assert seen == sizes(family)[0]
    assert all(float(r.weight.grad.abs().max()) > 0 for r in routers_of(loaded.model))  # type: ignore[union-attr,operator]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_its_own_choices_change_no_bit_in_whatever_order(
    make_mixture: MakeMixture, tiny_tokenizer: Any, family: str, dtype: torch.dtype
) -> None:
    loaded = wrap_model(make_mixture(family, dtype=dtype), tiny_tokenizer)
    rows = [row_of((8, 77, 130, 4), None), row_of((19, 4, 200), None)]
    packed = pack(rows)
    choices = Choices()
    with torch.no_grad(), choices.recording():
        live, _ = scored_without_record(loaded, packed)
    chosen = torch.stack(choices.chosen, 1)  # of packed tokens
    starts = (len(PROMPT), len(PROMPT) + 3)
    again = []
    for row, start in zip(rows, starts, strict=True):
        ids = torch.cat([chosen[: len(PROMPT)], chosen[start : start + len(row.token_ids) - 1]]).flip(-1)
        again.append(row_of(row.token_ids, ids))
    with torch.no_grad():
        replayed, routing = scored(loaded, pack(again))
    assert torch.equal(live, replayed)
    assert int(routing.replaced_of_tokens().sum()) == 0
    assert routing.metrics()["moe/replaced"].value == 0  # type: ignore[union-attr]


def scored_without_record(loaded: LoadedModel, packed: Packed) -> tuple[Tensor, None]:
    return loaded.scoring(packed, as_sampled=True).logprobs, None


def test_counts_and_shares_are_of_what_was_replayed(make_mixture: MakeMixture, tiny_tokenizer: Any) -> None:
    """Two rows of one prompt, one of another without routes: the last one's routers choose by themselves."""
    loaded = wrap_model(make_mixture("qwen3_moe"), tiny_tokenizer)
    ids = forced("qwen3_moe", 32, 3)
    rows = [row_of((8, 77, 130), ids), row_of((19, 4), ids), row_of((7, 7), None, group=1, prompt=(3, 4))]
    packed = pack(rows)
    choices = Choices()
    with torch.no_grad(), choices.recording():
        loaded.scoring(packed)
    own = torch.stack(choices.chosen, 1)
    with torch.no_grad():
        _, routing = scored(loaded, packed)
    places = {0: 3, 1: 6, 2: 7, 3: 3, 4: 8, 5: 5, 6: 9}  # predicted token -> packed one: p0 p1 | p2 c00 c01 c10 …
    assert packed.predictors.tolist() == [3, 6, 7, 3, 8, 5, 9], places
    replayed = {3: ids[3], 6: ids[4], 7: ids[5], 8: ids[4]}
    counts = torch.zeros(3, 16, dtype=torch.int64)
    first = own[:, 0]
    for place in packed.predictors.tolist():
        for layer in range(3):
            if place in replayed:
                counts[layer, replayed[place][layer]] += 1
    assert all(
        (torch.tensor(found) >= wanted).all() for found, wanted in zip(routing.expert_counts, counts, strict=True)
    )
    assert sum(sum(layer) for layer in routing.expert_counts) == 7 * 3 * 4
    # In the first layer the live router meets the same hidden states, so its choices are known.
    strange = [len(set(replayed[p][0].tolist()) - set(first[p].tolist())) for p in (3, 6, 7, 8)]
    assert [int(routing.replaced[0][p]) for p in (3, 6, 7, 8)] == strange
    assert [int(routing.replaced[0][p]) for p in (4, 5, 9)] == [0, 0, 0]


@pytest.mark.parametrize("family", ["qwen3_moe", "glm4_moe"])
def test_layers_that_are_computed_again_replay_too(make_mixture: MakeMixture, tiny_tokenizer: Any, family: str) -> None:
    ids = forced(family, 32, 4)

    def gradients(*, again: bool, ids: Tensor | None) -> dict[str, Tensor]:
        loaded = wrap_model(make_mixture(family), tiny_tokenizer)
        if again:
            recompute_layers(loaded.model)
            loaded.model.train()
        found, _ = scored(loaded, pack([row_of((8, 77, 130, 4), ids), row_of((19, 4, 200), ids)]))
        found.sum().backward()
        return {name: w.grad for name, w in loaded.model.named_parameters() if w.grad is not None}

    kept, computed, own = (
        gradients(again=False, ids=ids),
        gradients(again=True, ids=ids),
        gradients(again=True, ids=None),
    )
    assert kept.keys() == computed.keys()
    assert all(torch.equal(kept[name], computed[name]) for name in kept)
    assert any(not torch.equal(own[name], computed[name]) for name in own)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixture_says_what_it_is(make_mixture: MakeMixture, tiny_tokenizer: Any, family: str) -> None:
    layers, experts, k = sizes(family)
    sparse = (1, 2) if family == "glm4_moe" else (0, 1, 2)
    assert len(sparse) == layers
    assert mixture_of(wrap_model(make_mixture(family), tiny_tokenizer).model) == Mixture(3, sparse, experts, k)


def test_groups_of_experts_are_no_hindrance(make_mixture: MakeMixture, tiny_tokenizer: Any) -> None:
    """GLM asks for the two best of a group first: as many as a token's choices, over as many experts, is not that."""
    model = wrap_model(make_mixture("glm4_moe", n_group=1, num_experts_per_tok=2), tiny_tokenizer).model
    assert mixture_of(model) == Mixture(3, (1, 2), 16, 2)


def test_a_router_that_chooses_otherwise_is_refused(
    make_mixture: MakeMixture, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = wrap_model(make_mixture("mixtral"), tiny_tokenizer).model
    router: Any = type(routers_of(model)[0]).__mro__[2]

    def sorts(self: Any, hidden: Tensor) -> Any:
        logits = nn.functional.linear(hidden.reshape(-1, hidden.shape[-1]), self.weight)
        ids = logits.argsort(-1, descending=True)[:, :2]
        return logits, logits.gather(-1, ids).softmax(-1), ids

    monkeypatch.setattr(router, "forward", sorts)
    with pytest.raises(ConfigError, match="do not choose by their k largest scores"):
        mixture_of(model)
