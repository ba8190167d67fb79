"""The gradient is a function of the batch: not of how it is packed, ordered, split, shared or distributed."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from groupwise.algorithms import Algorithm, build_algorithm
from groupwise.batches import MiniBatch, TrainingRow
from groupwise.config import AlgorithmConfig, OptimConfig, TrainConfig
from groupwise.inputs import ModelInput, SampleKey
from groupwise.policy import Learner
from groupwise.policy.microbatches import MicroBatch, cut_batch
from groupwise.rollout.batch import BatchShape, build_batch
from groupwise.types import Completion, Prompt, Rollout, RolloutGroup

ROUND_OFF = 1e-11

tokens = st.integers(3, 63)
rewards = st.sampled_from([0.0, 0.5, 1.0, 1.0])


@st.composite
def rollouts(draw: st.DrawFn, index: int) -> Rollout:
    ids = tuple(draw(st.lists(tokens, min_size=1, max_size=7)))
    sampled = tuple(-4.0 + 0.1 * draw(st.integers(-10, 10)) for _ in ids)
    old = tuple(x + 0.1 * draw(st.integers(-5, 5)) for x in sampled)
    reward = draw(rewards)
    written = Completion(SampleKey("p", 0, index), ids, sampled, (0,) * len(ids), "", "stop")
    return replace(Rollout.one_turn(written, rewards={"r": reward}, reward=reward), old_logprobs=old)


@st.composite
def batches(draw: st.DrawFn) -> list[RolloutGroup]:
    made = []
    for index in range(draw(st.integers(2, 4))):
        prompt = Prompt(f"p{index}", (), "", ModelInput.of(tuple(draw(st.lists(tokens, min_size=1, max_size=6)))))
        size = draw(st.integers(2, 4))
        made.append(RolloutGroup(index, prompt, tuple(draw(rollouts(i)) for i in range(size))))
    return made


def minibatch(groups: list[RolloutGroup], objective: Algorithm) -> MiniBatch:
    batch = build_batch(groups, objective, shape=BatchShape(1, 16), reward_weights={"r": 1.0})
    return batch.minibatches[0]


def gradient(policy: Learner, batch: MiniBatch, microbatches: tuple[MicroBatch, ...]) -> torch.Tensor:
    """All of it, as one vector; zeros where nothing was learned."""
    for microbatch in microbatches:
        policy.forward_backward(microbatch, batch.denominators)
    parameters = list(policy.loaded.model.parameters())
    found = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters])
    policy.loaded.model.zero_grad()
    return found.clone()


def masked_row(group: int) -> TrainingRow:
    """Padding: a row of which no token counts, with advantages that would show."""
    return TrainingRow(
        group, ModelInput.of((9, 8)), ModelInput.of((7, 6, 5)), (0,) * 3, (50.0,) * 3, (-1.0,) * 3, (-2.0,) * 3
    )


def unshared(microbatch: MicroBatch) -> MicroBatch:
    """Every row with a prompt of its own."""
    return replace(microbatch, rows=tuple(replace(row, group=1000 + i) for i, row in enumerate(microbatch.rows)))


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"kl": {"coef": 0.1}, "entropy": {"coef": 0.05, "top_fraction": 0.6}},
        {"name": "dr_grpo", "kl": {"coef": 0.1, "estimator": "k2"}},
        {"name": "gspo", "correction": {"name": "truncate", "veto": 0.7}},
        {"name": "cispo", "correction": {"name": "mask", "level": "geometric"}},
        {"name": "gmpo", "correction": {"off_policy_mask": 0.1}},
        {"name": "reinforce_pp", "correction": {"name": "decoupled"}},
        {"name": "sapo", "advantage": {"scale": "batch"}},
        {"name": "rloo"},
    ],
    ids=lambda config: "-".join(map(str, config.values())) or "grpo",
)
@settings(
    max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(groups=batches(), data=st.data())
def test_the_gradient_of_a_batch_is_a_function_of_the_batch(
    make_model: Any, config: dict[str, Any], groups: list[RolloutGroup], data: st.DataObject
) -> None:
    objective = build_algorithm(AlgorithmConfig.model_validate(config))
    policy = Learner(
        make_model(torch.float64),
        objective,
        optim=OptimConfig(),  # pyright: ignore[reportCallIssue]
        train=TrainConfig(logprob_chunk_tokens=8),  # pyright: ignore[reportCallIssue]
        total_updates=1,
    )
    whole = minibatch(groups, objective)
    rows = sorted((*whole.rows, *whole.measured), key=lambda row: row.group)
    expected = gradient(policy, whole, (MicroBatch(tuple(rows)),))

    order = data.draw(st.permutations(groups))
    shuffled = [replace(g, rollouts=tuple(data.draw(st.permutations(g.rollouts)))) for g in order]
    cut = minibatch(shuffled, objective)
    parts = cut_batch(cut, data.draw(st.integers(1, 60)))
    halves = [gradient(policy, cut, parts[rank::2]) for rank in (0, 1)]
    learned = tuple(replace(mb, backward=True) for mb in parts)
    padded = (*parts, MicroBatch((masked_row(77),)))
    scale = float(expected.norm()) + 1  # parts of size 1 may cancel
    for name, found in {
        "split, packed and reordered": gradient(policy, cut, parts),
        "zero advantages learned as well": gradient(policy, cut, learned),
        "prompts not shared": gradient(policy, cut, tuple(unshared(mb) for mb in parts)),
        "padded": gradient(policy, cut, padded),
        "two halves": halves[0] + halves[1],
    }.items():
        assert float((found - expected).norm()) / scale < ROUND_OFF, name


def test_two_ranks_add_up_to_one(tmp_path: Path) -> None:
    script, out = Path(__file__).with_name("two_ranks.py"), tmp_path / "out.safetensors"
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(tmp_path / "meeting"), str(out)],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for rank in (0, 1)
    ]
    for process in ranks:
        _, errors = process.communicate(timeout=100)
        assert process.returncode == 0, errors
    found = load_file(out)
    one = {name.removeprefix("one/"): grad for name, grad in found.items() if name.startswith("one/")}
    assert len(found) == 2 * len(one)
    assert max(float(grad.abs().max()) for grad in one.values()) > 1e-3
    for name, grad in one.items():
        torch.testing.assert_close(found[f"two/{name}"], grad, rtol=1e-10, atol=1e-14, msg=name)
