"""A policy that trains an adapter: exact against the sampler, its reference in the same module, dropout by key."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from groupwise.algorithms import Algorithm, build_algorithm
from groupwise.batches import Denominators, TrainingRow
from groupwise.checkpoint import load_checkpoint, save_checkpoint
from groupwise.config import AlgorithmConfig, LoraConfig, OptimConfig, RolloutConfig, TrainConfig
from groupwise.engines.native import NativeEngine
from groupwise.inputs import ModelInput
from groupwise.metrics import resolve
from groupwise.model.forward.packing import pack
from groupwise.model.loading import LoadedModel, with_adapter
from groupwise.policy import Learner
from groupwise.policy.adapter_reference import AdapterReference
from groupwise.policy.microbatches import MicroBatch
from groupwise.policy.reference import Reference
from groupwise.types import Prompt, SampleRequest, SamplingParams

DENOMINATORS = Denominators(12.0, 2.0, 16.0)


def algorithm(**settings: Any) -> Algorithm:
    return build_algorithm(AlgorithmConfig.model_validate(settings))


def adapted(loaded: LoadedModel, **settings: Any) -> LoadedModel:
    return with_adapter(loaded, LoraConfig.model_validate({"rank": 4, **settings}), seed=1)


def make_policy(loaded: LoadedModel, *, kl_coef: float = 0.0, checkpointing: bool = False, **settings: Any) -> Learner:
    policy = Learner(
        loaded,
        algorithm(kl={"coef": kl_coef}),
        optim=OptimConfig.model_validate({"lr": 0.05, **settings}),
        train=TrainConfig.model_validate({"logprob_chunk_tokens": 8, "seed": 7}),
        total_updates=10,
        gradient_checkpointing=checkpointing,
    )
    policy.published()
    return policy


def row(group: int, length: int, advantage: float = 1.0) -> TrainingRow:
    tokens = tuple((7 * group + 3 * i + length) % 60 + 3 for i in range(length))
    return TrainingRow(
        group,
        ModelInput.of((10, 11, 12 + group)),
        ModelInput.of(tokens),
        (1,) * length,
        (advantage,) * length,
        (-4.0,) * length,
    )


BATCH = MicroBatch((row(0, 7), row(1, 5, -1.0)))


def update(policy: Learner) -> dict[str, float]:
    learned = resolve(policy.forward_backward(BATCH, DENOMINATORS))
    return learned | resolve(policy.optim_step())


def gradient(policy: Learner) -> dict[str, Tensor]:
    policy.forward_backward(BATCH, DENOMINATORS)
    found = {n: p.grad.clone() for n, p in policy.loaded.model.named_parameters() if p.grad is not None}
    policy.loaded.model.zero_grad()
    return found


def sampled(loaded: LoadedModel) -> tuple[TrainingRow, ...]:
    async def collect() -> tuple[TrainingRow, ...]:
        engine = NativeEngine(loaded, RolloutConfig.model_validate({}))
        rows = []
        for k in range(2):
            prompt = Prompt(f"p{k}", (), "", ModelInput.of(tuple(5 + k + i for i in range(3 + k))))
            requests = [SampleRequest.of(prompt, i, SamplingParams(max_tokens=11, seed=3)) for i in range(5)]
            for c in sorted([c async for c in engine.generate(requests)], key=lambda c: c.sample_index):
                size, sign = len(c.token_ids), 1.0 if c.sample_index % 2 else -1.0
                rows.append(
                    TrainingRow(
                        k,
                        prompt.input,
                        ModelInput.of(c.token_ids),
                        (1,) * size,
                        (sign,) * size,
                        c.logprobs,
                    )
                )
        return tuple(rows)

    return asyncio.run(collect())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [1, 4, 8, 16])
def test_sampler_and_trainer_agree_exactly(make_model: Any, dtype: torch.dtype, rank: int) -> None:
    loaded = adapted(make_model(dtype), rank=rank)
    policy = make_policy(loaded)
    before = [rows.logprobs for rows in sampled(loaded)]
    for _ in range(3):
        found = resolve(policy.forward_backward(MicroBatch(sampled(loaded)), DENOMINATORS))
        assert found["sampling/sampling_logp_difference/max"] == 0.0
        policy.optim_step()
        policy.published()
    assert [rows.logprobs for rows in sampled(loaded)] != before


def test_only_the_adapter_moves_and_is_stored(make_model: Any) -> None:
    loaded = adapted(make_model())
    policy = make_policy(loaded)
    before = {n: p.detach().clone() for n, p in loaded.model.named_parameters()}
    for _ in range(2):
        update(policy)
    moved = {n for n, p in loaded.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n in before if ".lora_" in n}
    assert set(policy.state_dict()["optimizer"]["masters"]) == moved


def test_bfloat16_adapters_have_float32_masters(make_model: Any) -> None:
    policy = make_policy(adapted(make_model(torch.bfloat16)), lr=1e-5)
    for _ in range(3):
        update(policy)
    state = policy.state_dict()["optimizer"]["masters"]
    assert {master.dtype for master in state.values()} == {torch.float32}
    weights = dict(policy.loaded.model.named_parameters())
    assert any(not torch.equal(master, weights[name].float()) for name, master in state.items())


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradient_checkpointing_changes_no_gradient(make_model: Any, dropout: float) -> None:
    found = []
    for checkpointing in (False, True):
        policy = make_policy(adapted(make_model(), dropout=dropout), checkpointing=checkpointing, kl_coef=0.1)
        update(policy)  # B is not zero any more, so that A has a gradient
        found.append(gradient(policy))
        assert not any(module.training for module in policy.loaded.model.modules())
    assert len(found[0]) == 28
    for name, expected in found[0].items():
        assert float(expected.abs().max()) > 0
        assert torch.equal(found[1][name], expected), name


# --- dropout ---


def test_dropout_acts_in_training_alone_and_by_key(make_model: Any, caplog: pytest.LogCaptureFixture) -> None:
    loaded = adapted(make_model(), dropout=0.4)
    policy, twin = make_policy(loaded), make_policy(adapted(make_model(), dropout=0.4))
    plain = make_policy(adapted(make_model()))
    for each in (policy, twin, plain):
        update(each)
    assert torch.equal(policy.log_probs([row(0, 5)]), policy.log_probs([row(0, 5)]))
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = gradient(policy)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    second = gradient(twin)
    assert all(torch.equal(first[name], second[name]) for name in first)  # the generator's state has no part in it
    third = gradient(policy)  # the next micro-batch of the same update
    assert any(not torch.equal(first[name], third[name]) for name in first)
    without = gradient(plain)
    assert any(not torch.equal(first[name], without[name]) for name in first)
    policy.published()
    caplog.clear()
    found = resolve(policy.forward_backward(MicroBatch(sampled(loaded)), DENOMINATORS))
    assert found["sampling/sampling_logp_difference/max"] > 0
    assert "sampler and trainer differ" not in caplog.text  # it is meant


# --- the reference ---


def test_the_reference_of_a_new_adapter_is_the_base_without_a_copy(make_model: Any) -> None:
    base = make_policy(make_model())
    policy = make_policy(adapted(make_model()), kl_coef=0.1)
    assert isinstance(policy.reference, AdapterReference)
    kls = [update(policy)["kl"] for _ in range(3)]
    assert kls[0] == 0.0
    assert kls[1] > 0
    packed = pack([row(0, 6)])
    assert torch.equal(policy.reference.logprobs([packed])[0], base.log_probs([row(0, 6)]))
    assert not torch.equal(policy.log_probs([row(0, 6)]), base.log_probs([row(0, 6)]))
    assert policy.reference.state_dict() == {}
    assert all(p.requires_grad for n, p in policy.loaded.model.named_parameters() if ".lora_" in n)


def test_kl_with_an_adapter_has_the_gradient_that_a_full_copy_gives(make_model: Any) -> None:
    for learned in (False, True):  # a new adapter, and one that is trained further
        loaded = adapted(make_model())
        if learned:
            update(make_policy(loaded))
        policy = make_policy(loaded, kl_coef=0.5)
        copied = make_policy(loaded, kl_coef=0.5)
        copied.reference = Reference(loaded, temperature=1.0, chunk_tokens=8)
        update(policy)
        mine, theirs = gradient(policy), gradient(copied)
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
        assert any(bool(g.any()) for g in mine.values())


def test_the_reference_of_a_trained_adapter_is_that_adapter(make_model: Any) -> None:
    loaded = adapted(make_model())
    update(make_policy(loaded))
    packed = pack([row(0, 6)])
    policy = make_policy(loaded, kl_coef=0.1)
    expected = policy.log_probs([row(0, 6)])
    update(policy)
    assert policy.reference is not None
    assert torch.equal(policy.reference.logprobs([packed])[0], expected)
    assert not torch.equal(policy.log_probs([row(0, 6)]), expected)


def test_the_reference_can_follow_the_policy(make_model: Any) -> None:
    loaded = adapted(make_model())
    policy = make_policy(loaded, kl_coef=0.1)
    reference = policy.reference
    assert isinstance(reference, AdapterReference)
    packed, rows = pack([row(0, 6)]), [row(0, 6)]
    update(policy)
    base = reference.logprobs([packed])[0]
    reference.sync(0.0)
    assert torch.equal(reference.logprobs([packed])[0], base)
    reference.sync(1.0)
    followed = policy.log_probs(rows)
    assert torch.equal(reference.logprobs([packed])[0], followed)
    update(policy)
    reference.sync(0.5)
    assert not torch.equal(reference.logprobs([packed])[0], followed)
    other = AdapterReference(loaded, temperature=1.0, chunk_tokens=8)
    other.load_state_dict(reference.state_dict())
    assert torch.equal(other.logprobs([packed])[0], reference.logprobs([packed])[0])


# --- state ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_restored_policy_goes_on_bitwise(make_model: Any, tmp_path: Path, dtype: torch.dtype, name: str) -> None:
    def fresh() -> Learner:
        return make_policy(adapted(make_model(dtype), dropout=0.2), kl_coef=0.1, name=name, lr=0.01)

    policy = fresh()
    for _ in range(3):
        update(policy)
    save_checkpoint(tmp_path, 3, {"policy": policy}, keep=1)
    other = fresh()
    load_checkpoint(tmp_path / "step_000003", {"policy": other})
    for _ in range(2):
        assert update(policy)["loss"] == update(other)["loss"]
    for mine, its in zip(policy.loaded.model.parameters(), other.loaded.model.parameters(), strict=True):
        assert torch.equal(mine, its)
