"""The policy computes rows as they were drawn; its reference, and what counts, split and bundles mean for them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from groupwise.algorithms import build_algorithm
from groupwise.batches import Denominators, ScoreRequest, TrainingRow
from groupwise.config import AlgorithmConfig, LoraConfig, OptimConfig, TrainConfig
from groupwise.inputs import ModelInput
from groupwise.metrics import Load, merge
from groupwise.model.loading import LoadedModel, with_adapter, wrap_model
from groupwise.policy import Learner, LocalPolicy
from groupwise.policy.microbatches import split_rows
from groupwise.policy.reference import FrozenScorer
from groupwise.sides import Kept, Routes, Sides
from groupwise.types import REFERENCE, TEACHER

LAYERS, EXPERTS, K = 3, 16, 4


@pytest.fixture
def mixture(make_mixture: Callable[..., PreTrainedModel], tiny_tokenizer: Any) -> LoadedModel:
    return wrap_model(make_mixture("qwen3_moe"), tiny_tokenizer)


def routes_of(rows: int, seed: int, prompt: bytes = b"") -> Routes:
    """Any experts, after those of the prompt."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(rows, LAYERS, EXPERTS, generator=generator).argsort(-1)[..., :K]
    data = bytes(ids.flatten().tolist())
    return Routes(prompt + data[len(prompt) :], "uint8", LAYERS, K)


def rows_of(groups: int = 4, size: int = 3, *, routes: bool = True, kept: bool = False) -> list[TrainingRow]:
    """With advantages of both signs; the rows of a group have one prompt and its experts."""
    generator = torch.Generator().manual_seed(5)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, 280, (count,), generator=generator).tolist())

    found = []
    for group in range(groups):
        prompt = tokens(4 + group)
        beginning = routes_of(len(prompt), 90 + group).data
        for member in range(size):
            follows = tokens(3 + (group * size + member) % 6)
            sets = [(*{token, 7, 9 + place},) for place, token in enumerate(follows)]
            sides = Sides(
                routes_of(len(prompt) + len(follows) - 1, 7 * group + member, beginning) if routes else None,
                Kept.of(sets) if kept else None,
            )
            numbers = (float(member - 1),) * len(follows)
            mask = tuple(int(place != 1) for place in range(len(follows)))
            row = TrainingRow(group, ModelInput.of(prompt), ModelInput.of(follows), mask, numbers, (-3.0,) * len(mask))
            found.append(replace(row, sides=sides))
    return found


def denominators_of(rows: Sequence[TrainingRow]) -> Denominators:
    return Denominators(float(sum(sum(row.loss_mask) for row in rows)), float(len(rows)), 16.0)


def learner_of(loaded: LoadedModel, *, checkpointing: bool = False, **algorithm: Any) -> Learner:
    objective = build_algorithm(AlgorithmConfig.model_validate(algorithm))
    optim, train = OptimConfig.model_validate({}), TrainConfig.model_validate({})
    return Learner(loaded, objective, optim=optim, train=train, total_updates=1, gradient_checkpointing=checkpointing)


def gradients(loaded: LoadedModel, rows: Sequence[TrainingRow], budget: int, **settings: Any) -> dict[str, Tensor]:
    learner = learner_of(loaded, **settings)
    parts = split_rows(rows, budget)
    learner.learn(parts, denominators_of(rows))
    found = {name: w.grad.clone() for name, w in loaded.model.named_parameters() if w.grad is not None}
    learner.release()
    loaded.model.zero_grad()
    return found


@pytest.mark.parametrize("settings", [{"router_aux_loss_coef": 0.3}, {"kl": {"coef": 0.1}}, {"entropy": {"coef": 0.1}}])
def test_the_split_changes_no_gradient(
    make_mixture: Callable[..., PreTrainedModel], tiny_tokenizer: Any, settings: dict[str, Any]
) -> None:
    def run(budget: int, rows: Sequence[TrainingRow], *, checkpointing: bool = False) -> dict[str, Tensor]:
        loaded = wrap_model(make_mixture("qwen3_moe", dtype=torch.float32), tiny_tokenizer)
        return gradients(loaded, rows, budget, checkpointing=checkpointing, **settings)

    rows = rows_of(kept=True)
    whole, parts, again = run(10_000, rows), run(20, rows), run(20, rows, checkpointing=True)
    bare = run(10_000, rows_of(routes=False, kept=True))
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-3, atol=2e-6 + 1e-4 * float(gradient.abs().max()))
        assert torch.equal(again[name], parts[name]), name
    assert any(not torch.allclose(bare[name], whole[name], rtol=0.05) for name in whole)


def test_counts_are_of_what_is_replayed(mixture: LoadedModel) -> None:
    rows = rows_of()
    learner = learner_of(mixture, router_aux_loss_coef=0.3)
    metrics = merge(*learner.learn(split_rows(rows, 40), denominators_of(rows)))
    wanted = torch.zeros(LAYERS, EXPERTS, dtype=torch.int64)
    for row in rows:
        assert row.sides.routes is not None
        ids = torch.tensor(list(row.sides.routes.data)).view(-1, LAYERS, K)
        for place, counts in enumerate(row.loss_mask):
            if counts:
                position = len(row.prompt) + place - 1
                for layer in range(LAYERS):
                    wanted[layer, ids[position, layer]] += 1
    load = metrics["moe/max_load"]
    assert isinstance(load, Load)
    assert torch.tensor(load.counts).tolist() == wanted.tolist()
    denominators = learner._learned[0].denominators
    assert denominators.expert_counts == tuple(tuple(layer) for layer in wanted.tolist())


@pytest.mark.parametrize("lora", [False, True], ids=["copy", "adapter"])
def test_no_other_model_replays_and_all_have_the_same_tokens_left(
    make_mixture: Callable[..., PreTrainedModel], tiny_tokenizer: Any, lora: bool
) -> None:
    """The policy's own forward without routes is what its reference, which is the policy yet, says with them."""
    loaded = wrap_model(make_mixture("qwen3_moe"), tiny_tokenizer)
    if lora:
        loaded = with_adapter(loaded, LoraConfig.model_validate({"rank": 2}))
    teacher = FrozenScorer(wrap_model(make_mixture("qwen3_moe"), tiny_tokenizer), temperature=1.0, chunk_tokens=64)
    policy = LocalPolicy(learner_of(loaded, kl={"coef": 0.1}), micro_batch_tokens=60, scorers={TEACHER: teacher})

    def asked(rows: Sequence[TrainingRow]) -> list[ScoreRequest]:
        return [ScoreRequest(row.prompt, row.follows, sides=row.sides) for row in rows]

    async def play() -> None:
        routed, cut, bare = (asked(rows_of(routes=a, kept=b)) for a, b in ((True, True), (False, True), (False, False)))
        own = await policy.log_probs(cut)
        assert await policy.log_probs(routed) != own
        for name in (REFERENCE, TEACHER):
            assert await policy.log_probs(routed, of=name) == own
        assert await policy.log_probs(bare, of=REFERENCE) == await policy.log_probs(bare) != own
        await policy.close()

    asyncio.run(play())


@pytest.mark.parametrize("kept", [False, True])
def test_the_kl_in_the_loss_is_to_a_reference_that_chooses_by_itself(mixture: LoadedModel, kept: bool) -> None:
    """Where rows do not bring its log-probs along, the learner asks it: with routes of any experts, it is another."""
    rows = rows_of(kept=kept)
    learner = learner_of(mixture, kl={"coef": 0.1})
    metrics = merge(*learner.learn(split_rows(rows, 60), denominators_of(rows)))
    assert metrics["kl"].value > 1e-3
    plain = rows_of(routes=False, kept=kept)
    assert merge(*learner.learn(split_rows(plain, 60), denominators_of(plain)))["kl"].value == 0


def test_old_log_probs_are_those_of_the_loss(mixture: LoadedModel) -> None:
    rows = rows_of(kept=True)
    learner = learner_of(mixture)
    policy = LocalPolicy(learner, micro_batch_tokens=60)
    requests = [ScoreRequest(row.prompt, row.follows, sides=row.sides) for row in rows]
    old = asyncio.run(policy.log_probs(requests))
    learner.published(exact=False)
    filled = [replace(row, logprobs=values, old_logprobs=values) for row, values in zip(rows, old, strict=True)]
    metrics = merge(*learner.learn(split_rows(filled, 60), denominators_of(filled)))
    assert metrics["sampling/sampling_logp_difference/max"].value == 0


def test_experts_that_are_another_requests_are_told_of(mixture: LoadedModel, caplog: pytest.LogCaptureFixture) -> None:
    rows = rows_of(groups=1)
    with caplog.at_level(logging.WARNING):
        metrics = merge(*learner_of(mixture).learn(split_rows(rows, 60), denominators_of(rows)))
    assert metrics["moe/replaced"].value == pytest.approx(1 - K / EXPERTS, abs=0.12)
    assert "named for a completion of group 0 are others than the policy's own" in caplog.text
