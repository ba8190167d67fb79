"""The policy over a real two-layer model: gradients that do not depend on the split, bad gradients, mismatch, KL."""

from __future__ import annotations

import asyncio
import copy
import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from groupwise.algorithms import Algorithm, build_algorithm
from groupwise.batches import Denominators, TrainingRow
from groupwise.checkpoint import load_checkpoint, save_checkpoint
from groupwise.config import AlgorithmConfig, OptimConfig, RolloutConfig, TrainConfig
from groupwise.engines.native import NativeEngine
from groupwise.errors import TrainingError
from groupwise.inputs import ModelInput
from groupwise.metrics import Metrics, resolve
from groupwise.model.loading import LoadedModel
from groupwise.policy import Learner
from groupwise.policy.microbatches import MicroBatch, cut_batch
from groupwise.rollout.batch import BatchShape, build_batch
from groupwise.types import Completion, Prompt, Rollout, RolloutGroup, SampleRequest, SamplingParams
from groupwise.weight_sync import InProcessSync

NEAR = 1e-5  # the norms inside the float64 model are computed in float32


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Length of the difference, as a part of the expected gradient's length."""
    return float((found - expected).norm() / expected.norm().clamp(min=1e-12))


def algorithm(**settings: Any) -> Algorithm:
    return build_algorithm(AlgorithmConfig.model_validate(settings))


def make_policy(loaded: LoadedModel, objective: Algorithm | None = None, **settings: Any) -> Learner:
    policy = Learner(
        loaded,
        objective or algorithm(),
        optim=OptimConfig.model_validate({"lr": 0.01, "max_grad_norm": 0, **settings}),
        train=TrainConfig.model_validate({"logprob_chunk_tokens": 8}),
        total_updates=10,
    )
    policy.published()
    return policy


def row(group: int, length: int, *, advantage: float = 1.0, prompt: int = 3) -> TrainingRow:
    tokens = tuple((7 * group + 3 * i + length) % 60 + 3 for i in range(length))
    return TrainingRow(
        group=group,
        prompt=ModelInput.of(tuple(10 + group + i for i in range(prompt))),
        follows=ModelInput.of(tokens),
        loss_mask=(1,) * length,
        advantages=(advantage,) * length,
        logprobs=(-4.0,) * length,
    )


def counts(rows: list[TrainingRow]) -> Denominators:
    return Denominators(float(sum(sum(r.loss_mask) for r in rows)), float(len(rows)), 16.0)


def gradients(policy: Learner, microbatches: list[MicroBatch], denominators: Denominators) -> dict[str, torch.Tensor]:
    for microbatch in microbatches:
        policy.forward_backward(microbatch, denominators)
    found = {n: p.grad.clone() for n, p in policy.loaded.model.named_parameters() if p.grad is not None}
    policy.loaded.model.zero_grad()
    return found


def sampled(
    loaded: LoadedModel, sampling: SamplingParams, *, prompts: int = 2, size: int = 4
) -> tuple[RolloutGroup, ...]:
    """Groups from the native engine; rewards alternate so that every group teaches something."""

    async def collect() -> list[RolloutGroup]:
        engine = NativeEngine(loaded, RolloutConfig.model_validate({}))
        groups = []
        for k in range(prompts):
            prompt = Prompt(f"p{k}", (), "", ModelInput.of(tuple(5 + k + i for i in range(3 + k))))
            requests = [SampleRequest.of(prompt, i, sampling) for i in range(size)]
            done = sorted([c async for c in engine.generate(requests)], key=lambda c: c.sample_index)
            groups.append(RolloutGroup(k, prompt, tuple(scored(c) for c in done)))
        return groups

    return tuple(asyncio.run(collect()))


def scored(c: Completion) -> Rollout:
    reward = float(c.sample_index % 2)
    return Rollout.one_turn(c, rewards={"r": reward}, reward=reward)


def one_step(policy: Learner, groups: tuple[RolloutGroup, ...], objective: Algorithm, **shape: int) -> list[Metrics]:
    """Metrics of every micro-batch of one batch, without the optimiser step."""
    batch = build_batch(
        groups,
        objective,
        shape=BatchShape(shape.get("steps", 1), 16),
        reward_weights={"r": 1.0},
    )
    return [
        policy.forward_backward(part, mini.denominators)
        for mini in batch.minibatches
        for part in cut_batch(mini, shape.get("tokens", 64))
    ]


# --- gradients ---


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "gspo", "cispo"])
def test_the_gradient_does_not_depend_on_the_split_or_order(make_model: Any, name: str) -> None:
    policy = make_policy(make_model(torch.float64), algorithm(name=name))
    rows = [row(g, n, advantage=a) for g, n, a in ((0, 5, 1.0), (0, 2, -1.0), (1, 7, 0.5), (1, 1, -0.5), (2, 4, 0.0))]
    denominators = counts(rows)
    whole = gradients(policy, [MicroBatch(tuple(rows))], denominators)
    assert max(float(g.abs().max()) for g in whole.values()) > 1e-4
    splits = {
        "one row each": [MicroBatch((r,)) for r in rows],
        "reversed": [MicroBatch(tuple(reversed(rows)))],
        "zero advantage unlearned": [MicroBatch(tuple(rows[:4])), MicroBatch((rows[4],), backward=False)],
        "a group in two": [MicroBatch((rows[0], rows[2])), MicroBatch((rows[3], rows[1], rows[4]))],
    }
    for split, microbatches in splits.items():
        found = gradients(policy, microbatches, denominators)
        for parameter, expected in whole.items():
            assert distance(found[parameter], expected) < NEAR, f"{split}: {parameter}"


@pytest.mark.parametrize("settings", [{}, {"kl": {"coef": 0.1}}, {"entropy": {"coef": 0.05}}, {"name": "gspo"}])
@pytest.mark.parametrize("budget", [1, 12, 10_000])
def test_the_gradient_of_a_batch_does_not_depend_on_micro_batch_tokens(
    make_model: Any, settings: dict[str, Any], budget: int
) -> None:
    objective = algorithm(**settings)
    loaded = make_model(torch.float64)
    groups = sampled(make_model(), SamplingParams(max_tokens=9, seed=4), prompts=3)
    # one group in which nothing is to be learned
    groups = (*groups[:2], replace(groups[2], rollouts=tuple(replace(r, reward=1.0) for r in groups[2].rollouts)))
    policy = make_policy(loaded, objective)

    def gradient(tokens: int, given: tuple[RolloutGroup, ...]) -> dict[str, torch.Tensor]:
        one_step(policy, given, objective, tokens=tokens)
        found = {n: p.grad.clone() for n, p in loaded.model.named_parameters() if p.grad is not None}
        loaded.model.zero_grad()
        return found

    expected = gradient(30, groups)
    for other in (gradient(budget, groups), gradient(budget, tuple(reversed(groups)))):
        for parameter, values in expected.items():
            assert distance(other[parameter], values) < NEAR, parameter


def test_the_gradient_is_that_of_a_plain_forward(make_model: Any) -> None:
    """A REINFORCE-like loss at ratio 1, over transformers' own unpacked forward."""
    policy = make_policy(make_model(torch.float64), algorithm(loss={"name": "reinforce"}))
    rows = [row(0, 4, advantage=1.0), row(1, 6, advantage=-0.5)]
    found = gradients(policy, [MicroBatch(tuple(rows))], counts(rows))
    plain = copy.deepcopy(policy.loaded.model)
    plain.set_attn_implementation("eager")
    plain.zero_grad()
    loss = torch.zeros((), dtype=torch.float64)
    for r in rows:
        ids = torch.tensor([*r.prompt_ids, *r.token_ids])
        logits = plain(input_ids=ids[None]).logits[0, len(r.prompt_ids) - 1 : -1]
        chosen = logits.log_softmax(-1).gather(-1, torch.tensor(r.token_ids)[:, None])[:, 0]
        loss = loss - r.advantages[0] * chosen.sum() / 10
    loss.backward()
    for name, parameter in plain.named_parameters():
        assert parameter.grad is not None
        assert distance(found[name], parameter.grad) < NEAR, name


def test_rows_without_backward_are_measured_and_leave_no_gradient(make_model: Any) -> None:
    policy = make_policy(make_model())
    metrics = resolve(policy.forward_backward(MicroBatch((row(0, 3),), backward=False), Denominators(3.0, 1.0, 16.0)))
    assert all(p.grad is None for p in policy.loaded.model.parameters())
    assert metrics["sampling/sampling_logp_difference/max"] > 0
    assert "loss" in metrics


def test_log_probs_are_those_of_the_tempered_distribution(make_model: Any) -> None:
    loaded = make_model()
    policy = Learner(
        loaded,
        algorithm(),
        optim=OptimConfig.model_validate({}),
        train=TrainConfig.model_validate({}),
        total_updates=1,
        temperature=0.5,
    )
    r = row(0, 5)
    plain = copy.deepcopy(loaded.model)
    plain.set_attn_implementation("eager")
    with torch.no_grad():
        logits = plain(input_ids=torch.tensor([[*r.prompt_ids, *r.token_ids]])).logits[0, 2:-1]
    expected = (logits / 0.5).log_softmax(-1).gather(-1, torch.tensor(r.token_ids)[:, None])[:, 0]
    torch.testing.assert_close(policy.log_probs([r]), expected, rtol=1e-4, atol=1e-4)


# --- gradients that are not finite ---


def poison(policy: Learner) -> None:
    policy.forward_backward(MicroBatch((row(0, 3, advantage=math.inf),)), Denominators(3.0, 1.0, 16.0))


def test_a_gradient_that_is_not_finite_skips_the_update(make_model: Any, caplog: pytest.LogCaptureFixture) -> None:
    policy = make_policy(make_model(), max_grad_norm=1.0)
    before = {n: p.detach().clone() for n, p in policy.loaded.model.named_parameters()}
    poison(policy)
    with caplog.at_level(logging.WARNING, logger="groupwise"):
        update = resolve(policy.optim_step())
    assert update["updates_skipped"] == 1
    assert not math.isfinite(update["grad_norm"])
    assert "update 0 skipped" in caplog.text
    assert all(torch.equal(p, before[n]) for n, p in policy.loaded.model.named_parameters())
    policy.forward_backward(MicroBatch((row(0, 3),)), Denominators(3.0, 1.0, 16.0))
    assert resolve(policy.optim_step())["updates_skipped"] == 0
    assert all(p.isfinite().all() for p in policy.loaded.model.parameters())
    assert any(not torch.equal(p, before[n]) for n, p in policy.loaded.model.named_parameters())


def test_the_third_in_a_row_raises_and_a_good_one_between_starts_anew(make_model: Any) -> None:
    policy = make_policy(make_model())
    for good in (False, False, True, False, False):
        if good:
            policy.forward_backward(MicroBatch((row(0, 3),)), Denominators(3.0, 1.0, 16.0))
        else:
            poison(policy)
        policy.optim_step()
    poison(policy)
    with pytest.raises(TrainingError, match=r"lower optim\.lr"):
        policy.optim_step()


def test_skips_in_a_row_survive_a_checkpoint(make_model: Any, tmp_path: Path) -> None:
    policy = make_policy(make_model())
    for _ in range(2):
        poison(policy)
        policy.optim_step()
    save_checkpoint(tmp_path, 2, {"policy": policy}, keep=1)
    other = make_policy(make_model(seed=1))
    load_checkpoint(tmp_path / "step_000002", {"policy": other})
    poison(other)
    with pytest.raises(TrainingError):
        other.optim_step()


# --- sampler and trainer ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampler_and_trainer_agree_exactly(make_model: Any, dtype: torch.dtype, tied: bool, temperature: float) -> None:
    loaded = make_model(dtype, tied=tied)
    objective = algorithm()
    policy = Learner(
        loaded,
        objective,
        optim=OptimConfig.model_validate({"lr": 0.01}),
        train=TrainConfig.model_validate({"logprob_chunk_tokens": 8}),
        total_updates=10,
        temperature=temperature,
    )
    policy.published()
    sampling = SamplingParams(max_tokens=12, temperature=temperature, seed=1)
    for _ in range(3):
        for found in one_step(policy, sampled(loaded, sampling), objective, tokens=40):
            assert resolve(found)["sampling/sampling_logp_difference/max"] == 0.0
            assert resolve(found)["sampling/sampling_logp_difference/mean"] == 0.0
        policy.optim_step()
        policy.published()


def test_a_weight_changed_after_sampling_is_noticed_with_its_place(
    make_model: Any, caplog: pytest.LogCaptureFixture
) -> None:
    loaded = make_model()
    objective = algorithm()
    policy = make_policy(loaded, objective)
    groups = tuple(replace(g, index=g.index + 40) for g in sampled(loaded, SamplingParams(max_tokens=6)))
    with torch.no_grad():
        loaded.model.get_input_embeddings().weight[:, 0] += 0.01
    with caplog.at_level(logging.WARNING, logger="groupwise"):
        found = [resolve(metrics) for metrics in one_step(policy, groups, objective, tokens=20)]
    assert max(metrics["sampling/sampling_logp_difference/max"] for metrics in found) > 0
    assert max(metrics["sampling/sampling_logp_difference/mean"] for metrics in found) > 0
    assert "first at token 0 of a completion of group 40" in caplog.text


def test_mismatch_is_measured_only_while_both_have_the_same_weights(make_model: Any) -> None:
    loaded = make_model()
    objective = algorithm()
    policy = make_policy(loaded, objective)
    groups = sampled(loaded, SamplingParams(max_tokens=6))
    name = "sampling/sampling_logp_difference/max"
    assert all(name in metrics for metrics in one_step(policy, groups, objective))
    policy.optim_step()
    assert not any(name in metrics for metrics in one_step(policy, groups, objective))

    async def publish() -> None:
        await InProcessSync(policy, NativeEngine(loaded, RolloutConfig.model_validate({}))).publish(1)  # pyright: ignore[reportArgumentType]

    asyncio.run(publish())
    assert all(name in metrics for metrics in one_step(policy, groups, objective))


# --- the reference ---


def test_the_reference_stays_while_the_policy_moves(make_model: Any) -> None:
    loaded = make_model()
    objective = algorithm(kl={"coef": 0.1})
    policy = make_policy(loaded, objective, lr=0.05)
    kls = []
    for _ in range(3):
        groups = sampled(loaded, SamplingParams(max_tokens=8))
        kls.append([resolve(metrics)["kl"] for metrics in one_step(policy, groups, objective, tokens=10_000)])
        policy.optim_step()
        policy.published()
    assert kls[0] == [0.0]
    assert kls[1][0] > 0
    assert kls[2][0] > kls[1][0] / 10
    assert policy.reference is not None
    reference = policy.reference.loaded
    for (name, mine), now in zip(make_model().model.named_parameters(), reference.model.parameters(), strict=True):
        assert torch.equal(mine, now), name
        assert not now.requires_grad


def test_without_kl_there_is_no_reference(make_model: Any) -> None:
    assert make_policy(make_model()).reference is None


# --- state ---


def test_a_restored_policy_goes_on_bitwise(make_model: Any, tmp_path: Path) -> None:
    policy = make_policy(make_model(), lr=0.01, schedule="linear", weight_decay=0.1)
    batches = [MicroBatch((row(k, 4), row(k, 2, advantage=-1.0))) for k in range(6)]
    denominators = Denominators(6.0, 2.0, 16.0)

    def learn(each: Learner, batch: MicroBatch) -> float:
        each.forward_backward(batch, denominators)
        return resolve(each.optim_step())["learning_rate"]

    first = [learn(policy, batch) for batch in batches[:3]]
    save_checkpoint(tmp_path, 3, {"policy": policy}, keep=1)
    other = make_policy(make_model(seed=5), lr=0.01, schedule="linear", weight_decay=0.1)
    load_checkpoint(tmp_path / "step_000003", {"policy": other})
    rest = [learn(policy, batch) for batch in batches[3:]]
    assert [learn(other, batch) for batch in batches[3:]] == rest
    assert first + rest == sorted(first + rest, reverse=True)
    for mine, its in zip(policy.loaded.model.parameters(), other.loaded.model.parameters(), strict=True):
        assert torch.equal(mine, its)


def test_gradient_checkpointing_changes_no_gradient(make_model: Any) -> None:
    rows = [row(0, 5), row(0, 3, advantage=-1.0)]
    found = []
    for checkpointing in (False, True):
        policy = Learner(
            make_model(),
            algorithm(),
            optim=OptimConfig.model_validate({}),
            train=TrainConfig.model_validate({}),
            total_updates=1,
            gradient_checkpointing=checkpointing,
        )
        found.append(gradients(policy, [MicroBatch(tuple(rows))], counts(rows)))
        assert not policy.loaded.model.training
    for name, expected in found[0].items():
        assert torch.equal(found[1][name], expected), name


def test_without_a_micro_batch_the_loss_is_zero(make_model: Any) -> None:
    policy = make_policy(make_model())
    [learned] = policy.learn((), Denominators(0.0, 0.0, 8.0))
    assert resolve(learned) == {"loss": 0.0}
