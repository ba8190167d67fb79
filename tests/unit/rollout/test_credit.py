"""Credit per token: the teacher's equation, its sum with the outcome, and a teacher that has nothing to teach."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from groupwise.algorithms import build_algorithm
from groupwise.algorithms.teacher import TeacherCredit
from groupwise.batches import TrainingBatch, mean_credit
from groupwise.config import AlgorithmConfig
from groupwise.inputs import ModelInput
from groupwise.metrics import resolve
from groupwise.rollout.batch import BatchShape, build_batch, is_learnable, teaches, usable_samples
from groupwise.types import TEACHER, RolloutGroup, Segment

DISTILL: dict[str, Any] = {"name": "distill", "teacher": {"path": "somewhere"}}
BOTH: dict[str, Any] = {"name": "dr_grpo", "teacher": {"path": "somewhere", "coef": 0.5}}


def taught(group: RolloutGroup, by: float) -> RolloutGroup:
    """The teacher's log-probs lie `by` above the sampler's, times the token's place from 1."""

    def scores(logprobs: tuple[float, ...]) -> dict[str, tuple[float, ...]]:
        return {TEACHER: tuple(x + by * (t + 1) for t, x in enumerate(logprobs))}

    return replace(group, rollouts=tuple(replace(r, scores=scores(r.logprobs)) for r in group.rollouts))


def build(groups: list[RolloutGroup], settings: dict[str, Any]) -> TrainingBatch:
    algorithm = build_algorithm(AlgorithmConfig.model_validate(settings))
    return build_batch(groups, algorithm, shape=BatchShape(1, 9), reward_weights={"r": 1.0})


def test_credit_is_the_log_ratio_to_the_teacher(make_group: Any) -> None:
    batch = build([taught(make_group(0, [1.0, 0.0], [2, 3]), 0.1)], DISTILL)
    assert batch.credit[0][0] == pytest.approx((0.1, 0.2))
    assert batch.credit[0][1] == pytest.approx((0.1, 0.2, 0.3))
    assert [row.advantages for row in batch.minibatches[0].rows] == [*batch.credit[0]]
    found = resolve(batch.metrics)
    assert found["credit/teacher_mean"] == pytest.approx(0.9 / 5)
    values = torch.tensor([0.1, 0.2, 0.1, 0.2, 0.3])
    assert found["credit/teacher_std"] == pytest.approx(float(values.std(correction=0)), rel=1e-6)
    assert mean_credit(batch.credit[0][1]) == pytest.approx(0.2)


def test_terms_add_up(make_group: Any) -> None:
    batch = build([taught(make_group(0, [1.0, 0.0], [2, 3]), 0.1)], BOTH)
    assert batch.credit[0][0] == pytest.approx((0.5 + 0.05, 0.5 + 0.1))
    assert batch.credit[0][1] == pytest.approx((-0.5 + 0.05, -0.5 + 0.1, -0.5 + 0.15))


def test_a_teacher_equal_to_the_sampler_has_nothing_to_teach(make_group: Any) -> None:
    batch = build([taught(make_group(0, [1.0, 0.0], [2, 3]), 0.0)], DISTILL)
    assert [set(credit) for credit in batch.credit[0]] == [{0.0}, {0.0}]  # pyright: ignore[reportArgumentType]
    assert batch.minibatches[0].rows == ()  # no backward pass at all
    assert len(batch.minibatches[0].measured) == 2


def test_the_clamp_cuts_and_is_counted(make_group: Any) -> None:
    settings = {**DISTILL, "teacher": {"path": "somewhere", "clamp": 0.25}}
    batch = build([taught(make_group(0, [1.0, 0.0], [2, 3]), -0.1)], settings)
    assert batch.credit[0][1] == pytest.approx((-0.1, -0.2, -0.25))
    assert resolve(batch.metrics)["credit/teacher_clamped"] == pytest.approx(1 / 5)


def test_sources_are_told_apart(make_group: Any) -> None:
    one, two = make_group(0, [1.0], [2]), make_group(1, [0.0], [2])
    two = replace(two, prompt=replace(two.prompt, data_source="other"))
    found = resolve(build([taught(one, 0.1), taught(two, -0.1)], DISTILL).metrics)
    assert found["credit/teacher_mean/test"] == pytest.approx(0.15)
    assert found["credit/teacher_mean/other"] == pytest.approx(-0.15)


def test_an_environments_tokens_have_no_credit(make_group: Any) -> None:
    group = make_group(0, [1.0, 0.0], [2, 2])
    first = group.rollouts[0]
    said = Segment.answer(ModelInput.of((40, 41)), "said", (), version=3)
    first = replace(first, segments=(first.segments[0], said, first.segments[0]))
    batch = build([taught(replace(group, rollouts=(first, group.rollouts[1])), 0.1)], DISTILL)
    assert batch.credit[0][0] == pytest.approx((0.1, 0.2, 0.0, 0.0, 0.5, 0.6))
    assert batch.minibatches[0].rows[0].loss_mask == (1, 1, 0, 0, 1, 1)


def test_neither_a_reward_nor_a_group_is_needed(make_group: Any) -> None:
    algorithm = build_algorithm(AlgorithmConfig.model_validate(DISTILL))
    group = taught(make_group(0, [None, "failed"], [2, 3]), 0.1)
    assert [is_learnable(rollout, algorithm) for rollout in group.rollouts] == [True, False]
    assert teaches(group, algorithm, reward_weights={})
    assert usable_samples([group], algorithm).count == 1
    batch = build([taught(make_group(0, [None], [2]), 0.1)], DISTILL)
    assert len(batch.minibatches[0].rows) == 1
    needs = build_algorithm(AlgorithmConfig.model_validate(BOTH))
    assert not is_learnable(group.rollouts[0], needs)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"name": "distill"}, "set teacher.path"),
        ({"name": "gspo", "teacher": {"path": "a"}}, "one ratio per completion"),
        ({"teacher": {"coef": 2.0}}, "no effect with path = none"),
        ({**DISTILL, "kl": {"coef": 0.1, "place": "reward"}}, "has no use for rewards"),
        ({**BOTH, "correction": {"off_policy_mask": 0.1}}, "the sign of a completion's advantage"),
    ],
    ids=str,
)
def test_what_does_not_go_with_a_teacher_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        AlgorithmConfig.model_validate(settings)


def test_masked_tokens_may_hold_anything() -> None:
    term = TeacherCredit()
    teacher, old = torch.tensor([-1.0, -math.inf]), torch.tensor([-2.0, -math.inf])
    assert term.of(teacher, old, torch.tensor([1, 0])).tolist() == [1.0, 0.0]
