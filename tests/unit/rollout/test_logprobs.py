"""The pass that computes log-probs before a step learns: what it fills in, and that a correction then acts."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from groupwise.algorithms import build_algorithm
from groupwise.config import AlgorithmConfig, ModelConfig, OptimConfig, TrainConfig
from groupwise.metrics import merge, resolve
from groupwise.model.loading import load_model
from groupwise.policy import Learner, LocalPolicy
from groupwise.policy.microbatches import cut_batch
from groupwise.quickstart.tiny_model import build_tiny_model
from groupwise.rollout import LogprobPass, build_batch
from groupwise.rollout.batch import BatchShape
from groupwise.types import REFERENCE, RolloutGroup

MISMATCH = "sampling/sampling_logp_difference/max"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "model"
    build_tiny_model(folder, texts=["one two"], size="0.1m", vocab_size=259)
    return folder


def make_policy(model: Path, **settings: Any) -> Learner:
    torch.set_num_threads(1)
    config = ModelConfig.model_validate({"path": str(model), "device": "cpu", "dtype": "float32"})
    objective = build_algorithm(AlgorithmConfig.model_validate(settings))
    policy = Learner(load_model(config), objective, optim=OptimConfig(lr=0.01), train=TrainConfig(), total_updates=4)  # pyright: ignore[reportCallIssue]
    policy.published()
    return policy


def fill(policy: Learner, groups: list[RolloutGroup], *, old: bool, reference: bool = False, budget: int = 12) -> Any:
    settings = {"kl": {"coef": 0.1, "place": "reward"}} if reference else {}
    algorithm = build_algorithm(AlgorithmConfig.model_validate(settings))
    awaited = LocalPolicy(policy, micro_batch_tokens=budget)
    return asyncio.run(LogprobPass(awaited, algorithm, old=old).add(groups))


def test_nothing_is_computed_where_nothing_is_asked(make_group: Any, model: Path) -> None:
    groups = [make_group(0, [1.0, 0.0])]
    filled = fill(make_policy(model), groups, old=False)
    assert filled == tuple(groups)


@pytest.mark.parametrize("budget", [1, 12, 1000])
def test_each_rollout_gets_its_own(make_group: Any, model: Path, budget: int) -> None:
    policy = make_policy(model, kl={"coef": 0.1, "place": "reward"})
    groups = [make_group(0, [1.0, 0.0, "failed"], [4, 2, 3]), make_group(1, [0.5, None, 0.0], [1, 2, 5])]
    filled = fill(policy, groups, old=True, reference=True, budget=budget)
    alone = fill(policy, [groups[1]], old=True, reference=True, budget=1000)
    assert filled[1] == alone[0]
    assert [r.old_logprobs is None for r in filled[0].rollouts] == [False, False, True]
    assert [REFERENCE not in r.scores for r in filled[1].rollouts] == [False, True, False]
    assert [len(r.old_logprobs) for r in filled[0].rollouts[:2]] == [4, 2]
    assert filled[0].rollouts[0].old_logprobs == filled[0].rollouts[0].scores[REFERENCE]
    assert filled[0].rollouts[0].logprobs == groups[0].rollouts[0].logprobs


def learned(policy: Learner, groups: Any, **settings: Any) -> dict[str, float]:
    objective = build_algorithm(AlgorithmConfig.model_validate(settings))
    batch = build_batch(groups, objective, shape=BatchShape(1, 9), reward_weights={"r": 1.0})
    (mini,) = batch.minibatches
    return resolve(merge(*(policy.forward_backward(mb, mini.denominators) for mb in cut_batch(mini, 100))))


def sampled_by(policy: Learner, groups: list[RolloutGroup], *, off: float) -> list[RolloutGroup]:
    """As if an engine had reported the policy's log-probs with the error `off`."""
    filled = fill(policy, groups, old=True)
    return [
        replace(
            group,
            rollouts=tuple(
                replace(
                    r,
                    segments=(replace(r.segments[0], logprobs=tuple(x - off for x in r.old_logprobs or ())),),
                    old_logprobs=None,
                )
                for r in group.rollouts
            ),
        )
        for group in filled
    ]


@pytest.mark.parametrize(
    ("settings", "weight"),
    [
        ({"correction": {"name": "decoupled"}}, 1.5),
        ({"correction": {"name": "truncate", "high": 1.2}}, 1.2),
        ({"correction": {"name": "mask", "high": 1.4}}, 0.0),
        ({"correction": {"veto": 0.99}}, 1.0),
        ({"name": "gspo", "correction": {"name": "decoupled", "level": "geometric"}}, 1.5),
    ],
    ids=str,
)
def test_corrections_weigh_the_samplers_error(
    make_group: Any, model: Path, settings: dict[str, Any], weight: float
) -> None:
    policy = make_policy(model, **settings)
    groups = sampled_by(policy, [make_group(0, [1.0, 0.0], [3, 4])], off=0.405465)
    found = learned(policy, fill(policy, groups, old=True), **settings)
    assert found["correction/weight_mean"] == pytest.approx(weight, rel=1e-4)
    assert found[MISMATCH] == pytest.approx(0.405465, rel=1e-4)
    assert found["clip_ratio/region_mean"] == 0.0


def test_the_samplers_own_logprobs_weigh_exactly_one(make_group: Any, model: Path) -> None:
    policy = make_policy(model, correction={"name": "decoupled"})
    groups = sampled_by(policy, [make_group(0, [1.0, 0.0], [3, 4]), make_group(1, [0.0, 1.0])], off=0.0)
    found = learned(policy, fill(policy, groups, old=True), correction={"name": "decoupled"})
    assert found["correction/weight_mean"] == 1.0
    assert found[MISMATCH] == 0.0


def test_the_proximal_policy_is_the_one_before_the_first_update(make_group: Any, model: Path) -> None:
    policy = make_policy(model, correction={"name": "decoupled"})
    groups = fill(policy, sampled_by(policy, [make_group(0, [1.0, 0.0], [3, 4])], off=0.2), old=True)
    assert learned(policy, groups, correction={"name": "decoupled"})["clip_ratio/region_mean"] == 0.0
    for _ in range(4):
        policy.optim_step()
        found = learned(policy, groups, correction={"name": "decoupled"})
    assert found["clip_ratio/region_mean"] > 0  # pyright: ignore[reportPossiblyUnboundVariable]
    assert found["correction/weight_mean"] == pytest.approx(1.2214, rel=1e-3)  # pyright: ignore[reportPossiblyUnboundVariable]
