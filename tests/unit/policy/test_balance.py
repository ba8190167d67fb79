"""Mixtures of experts in the policy: the balance loss, its counts and metrics, recomputed layers."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from groupwise.algorithms import build_algorithm
from groupwise.batches import Denominators, TrainingRow
from groupwise.config import AlgorithmConfig, LoraConfig, OptimConfig, TrainConfig
from groupwise.errors import ConfigError
from groupwise.inputs import ModelInput
from groupwise.metrics import Load, Mean, merge, resolve
from groupwise.model.loading import LoadedModel, with_adapter, wrap_model
from groupwise.policy import Learner
from groupwise.policy.microbatches import MicroBatch, split_rows

MakeMixture = Callable[..., PreTrainedModel]
COEF = 0.3


@pytest.fixture
def mixture(make_mixture: MakeMixture, tiny_tokenizer: Any) -> LoadedModel:
    return wrap_model(make_mixture("qwen3_moe"), tiny_tokenizer)


def rows_of(groups: int = 8, size: int = 2, *, advantage: float = 0.0) -> list[TrainingRow]:
    """Prompts and completions of many lengths; the second token of each completion has no loss."""
    generator = torch.Generator().manual_seed(3)
    rows = []
    for group in range(groups):
        prompt = tuple(torch.randint(3, 280, (3 + group % 4,), generator=generator).tolist())
        for member in range(size):
            count = 4 + (group * size + member) % 7
            tokens = tuple(torch.randint(3, 280, (count,), generator=generator).tolist())
            mask = tuple(int(place != 1) for place in range(count))
            rows.append(
                TrainingRow(
                    group, ModelInput.of(prompt), ModelInput.of(tokens), mask, (advantage,) * count, (-5.0,) * count
                )
            )
    return rows


def denominators_of(rows: Sequence[TrainingRow]) -> Denominators:
    return Denominators(float(sum(sum(row.loss_mask) for row in rows)), float(len(rows)), 16.0)


def policy_of(loaded: LoadedModel, coef: float = COEF, **settings: Any) -> Learner:
    objective = build_algorithm(AlgorithmConfig(router_aux_loss_coef=coef))  # pyright: ignore[reportCallIssue]
    optim, train = OptimConfig(), TrainConfig()  # pyright: ignore[reportCallIssue]
    return Learner(loaded, objective, optim=optim, train=train, total_updates=1, **settings)


def gradient(policy: Learner) -> Tensor:
    weights = list(policy.loaded.model.parameters())
    found = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in weights])
    policy.loaded.model.zero_grad()
    return found.clone()


def by_hand(model: Any, rows: Sequence[TrainingRow]) -> tuple[Tensor, list[Tensor]]:
    """The loss, mean over layers of E Σ_e F_e Σ_t p_e(t) / N², from a plain forward of each row; and F by layer."""
    logits: dict[int, list[Tensor]] = {}
    for row in rows:
        tokens = torch.tensor([row.prompt_ids + row.token_ids])
        keep = [len(row.prompt_ids) - 1 + place for place, counts in enumerate(row.loss_mask) if counts]
        for number, layer in enumerate(model.model(tokens, output_router_logits=True).router_logits):
            logits.setdefault(number, []).append(layer.reshape(tokens.shape[1], -1)[keep])
    losses, loads = [], []
    for layer in (torch.cat(parts) for parts in logits.values()):
        chosen = layer.topk(4, -1).indices
        loads.append(torch.nn.functional.one_hot(chosen, 16).sum((0, 1)))
        losses.append(16 * (loads[-1] * layer.softmax(-1).sum(0)).sum() / len(layer) ** 2)
    return torch.stack(losses).mean(), loads


def test_the_loss_and_its_gradient_are_the_equations(mixture: LoadedModel, make_mixture: MakeMixture) -> None:
    rows = rows_of()
    policy = policy_of(mixture)
    (found,) = policy.learn([MicroBatch(tuple(rows))], denominators_of(rows))
    plain: Any = make_mixture("qwen3_moe")
    loss, loads = by_hand(plain, rows)
    assert isinstance(found["aux_loss"], Mean)
    assert found["aux_loss"].value == pytest.approx(float(loss), rel=1e-5)
    assert found["loss"].value == pytest.approx(COEF * float(loss), rel=1e-5)
    load = found["moe/max_load"]
    assert isinstance(load, Load)
    assert load.counts == tuple(tuple(layer.tolist()) for layer in loads)
    (COEF * loss).backward()
    wanted = torch.cat(
        [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in plain.parameters()]
    )
    assert wanted.norm() > 1e-3
    assert (gradient(policy) - wanted).norm() < 1e-5 * wanted.norm()


@pytest.mark.parametrize("threads", [1, 2])
def test_the_gradient_is_the_same_for_any_split(mixture: LoadedModel, threads: int) -> None:
    """One, two, four and sixteen parts, groups divided among them, also on two streams."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        rows = rows_of()
        policy = policy_of(mixture)
        found: list[tuple[Tensor, dict[str, float]]] = []
        for parts in (1, 2, 4, 16):
            share = len(rows) // parts
            cut = [MicroBatch(tuple(rows[i : i + share])) for i in range(0, len(rows), share)]
            metrics = merge(*policy.learn(cut, denominators_of(rows)))
            found.append((gradient(policy), resolve({k: m for k, m in metrics.items() if "moe/" in k or "loss" in k})))
        wanted, numbers = found[0]
        for some, other in found[1:]:
            assert (some - wanted).norm() <= 1e-6 * wanted.norm()
            assert other == pytest.approx(numbers, rel=1e-6)
            assert {k: v for k, v in other.items() if "moe" in k} == {k: v for k, v in numbers.items() if "moe" in k}
        assert wanted.norm() > 1e-3
    finally:
        torch.set_num_threads(before)


def test_parts_counted_alone_would_have_another_gradient(mixture: LoadedModel) -> None:
    """What the counts over the whole batch are for."""
    rows = rows_of()
    policy = policy_of(mixture)
    policy.learn([MicroBatch(tuple(rows))], denominators_of(rows))
    wanted = gradient(policy)
    for row in rows:
        policy.forward_backward(MicroBatch((row,)), denominators_of(rows))
    assert (gradient(policy) - wanted).norm() > 0.1 * wanted.norm()


def test_known_counts_are_not_counted_again(mixture: LoadedModel) -> None:
    rows = rows_of(2)
    counts = ((1,) * 16,) * 3
    given = Denominators(10.0, 4.0, 16.0, counts)
    policy = policy_of(mixture)
    (found,) = policy.learn([MicroBatch(tuple(rows))], given)
    tokens = sum(sum(row.loss_mask) for row in rows)
    assert found["loss"].value == pytest.approx(COEF * 16 * tokens / 100, rel=1e-5)  # Σ_e p_e(t) is 1


def test_layers_that_are_computed_again_choose_the_same(mixture: LoadedModel) -> None:
    rows = rows_of(advantage=1.0)
    parts = split_rows(rows, 60)
    assert len(parts) > 2
    found = []
    for recomputes in (False, True):
        policy = policy_of(mixture, gradient_checkpointing=recomputes)
        metrics = policy.learn(parts, denominators_of(rows))
        found.append((gradient(policy), resolve(merge(*metrics))))
        policy.release()
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


def test_metrics_of_load_are_of_tokens_with_a_loss_and_need_no_coefficient(mixture: LoadedModel) -> None:
    rows = rows_of()
    policy = policy_of(mixture, 0.0)
    metrics = merge(*policy.learn(split_rows(rows, 40), denominators_of(rows)))
    load = metrics["moe/dead"]
    assert isinstance(load, Load)
    tokens = sum(sum(row.loss_mask) for row in rows)
    assert [sum(layer) for layer in load.counts] == [4 * tokens] * 3
    numbers = resolve(metrics)
    counts = torch.tensor(load.counts, dtype=torch.float64)
    assert numbers["moe/max_load"] == pytest.approx(float((counts.amax(1) / counts.mean(1)).max()))
    assert numbers["moe/dead"] == float((counts == 0).double().mean())
    shares = counts / counts.sum(1, keepdim=True)
    assert numbers["moe/entropy"] == pytest.approx(float(torch.special.entr(shares).sum(1).mean()))
    assert 0 < numbers["moe/entropy"] < math.log(16)
    assert "aux_loss" not in numbers


def test_a_row_without_advantage_is_learned_for_its_balance() -> None:
    algorithm = build_algorithm(AlgorithmConfig(router_aux_loss_coef=COEF))  # pyright: ignore[reportCallIssue]
    assert algorithm.learns_without_advantage


@pytest.mark.parametrize("family", ["qwen3_moe", "glm4_moe", "mixtral", "qwen2_moe"])
def test_lora_adapts_attention_and_says_that_experts_are_left(
    family: str, make_mixture: MakeMixture, tiny_tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Beside each other on two streams, where an adapter that changes its module in a forward would fail."""
    model = wrap_model(make_mixture(family), tiny_tokenizer)
    adapted = with_adapter(model, LoraConfig(rank=4))  # pyright: ignore[reportCallIssue]
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with caplog.at_level(logging.INFO):
            policy = policy_of(adapted, 0.0)
        assert "the experts and their routers have no adapter" in caplog.text
        rows = rows_of(advantage=1.0)
        policy.learn(split_rows(rows, 60), denominators_of(rows))
    finally:
        torch.set_num_threads(before)
    weights = {name: weight for name, weight in adapted.model.named_parameters() if weight.requires_grad}
    assert weights
    assert all(".self_attn." in name for name in weights)
    assert all(bool(weight.grad.any()) for name, weight in weights.items() if ".lora_B." in name)  # pyright: ignore[reportOptionalMemberAccess]
    adapter = adapted.adapter
    assert adapter is not None
    assert adapter.target_modules == ["k_proj", "o_proj", "q_proj", "v_proj"]
    assert not adapter.target_parameters


def test_lora_on_names_that_peft_takes_for_experts_is_refused(make_mixture: MakeMixture, tiny_tokenizer: Any) -> None:
    model = wrap_model(make_mixture("glm4_moe"), tiny_tokenizer)
    names = ("gate_proj", "up_proj", "q_proj")
    with pytest.raises(
        ConfigError, match=r"takes some of these names for the experts of this mixture \(gate_up_proj\).*all-linear"
    ):
        with_adapter(model, LoraConfig(rank=4, target_modules=names))  # pyright: ignore[reportCallIssue]
