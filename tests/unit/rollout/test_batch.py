"""Groups into the trainer's batch: who counts, who learns, and what is reported."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from groupwise.algorithms import build_algorithm
from groupwise.batches import TrainingBatch, TrainingRow
from groupwise.config import AlgorithmConfig
from groupwise.metrics import Mean, resolve
from groupwise.rollout.batch import BatchShape, build_batch, teaches, usable_samples
from groupwise.rollout.records import ledger_rows, trajectory_rows
from groupwise.types import REFERENCE, RolloutGroup


def build(groups: list[RolloutGroup], *, steps: int = 1, **settings: Any) -> TrainingBatch:
    return build_batch(
        groups,
        build_algorithm(AlgorithmConfig.model_validate(settings)),
        shape=BatchShape(steps, 9),
        reward_weights={"r": 1.0},
    )


def rows(batch: TrainingBatch, *, backward: bool) -> list[TrainingRow]:
    return [row for mini in batch.minibatches for row in (mini.rows if backward else mini.measured)]


def test_denominators_count_the_whole_batch(make_group: Any) -> None:
    batch = build([make_group(0, [1.0, 0.0], [3, 5]), make_group(1, [1.0, 1.0], [2, 4])])
    (mini,) = batch.minibatches
    assert mini.denominators.tokens == 14
    assert mini.denominators.sequences == 4
    assert mini.denominators.max_tokens == 9
    assert (len(mini.rows), len(mini.measured)) == (2, 2)


def test_a_row_carries_its_rollout(make_group: Any) -> None:
    batch = build([make_group(5, [1.0, 0.0], [2, 3])])
    first, second = rows(batch, backward=True)
    assert first.group == 5
    assert first.prompt_ids == (6, 7, 8)
    assert first.token_ids == (10, 11)
    assert first.logprobs == (-0.5, -0.51)
    assert first.advantages[0] > 0 > second.advantages[0]
    assert len(set(second.advantages)) == 1


def test_advantages_are_one_per_rollout_also_for_those_left_out(make_group: Any) -> None:
    batch = build([make_group(0, [1.0, "failed", 0.0, None])])
    (advantages,) = batch.credit
    assert advantages[1] == 0.0 == advantages[3]
    # (1, 0): mean 0.5, std 0.7071 with n - 1
    assert advantages[0] == pytest.approx(0.7071, abs=1e-3)
    assert advantages[2] == pytest.approx(-0.7071, abs=1e-3)


def test_failed_and_unrewarded_rollouts_are_neither_rows_nor_counted(make_group: Any) -> None:
    batch = build([make_group(0, [1.0, "failed", 0.0, None], [2, 30, 3, 40])])
    assert [len(r.token_ids) for r in rows(batch, backward=True)] == [2, 3]
    assert rows(batch, backward=False) == []
    assert batch.minibatches[0].denominators.tokens == 5
    assert batch.minibatches[0].denominators.sequences == 2
    found = resolve(batch.metrics)
    assert found["rollout/failed"] == 1
    assert found["reward"] == 0.5


def test_equal_rewards_are_measured_without_backward_but_counted(make_group: Any) -> None:
    batch = build([make_group(0, [1.0, 1.0], [3, 4]), make_group(1, [1.0, 0.0], [2, 2])])
    assert [r.group for r in rows(batch, backward=False)] == [0, 0]
    assert [r.group for r in rows(batch, backward=True)] == [1, 1]
    assert batch.minibatches[0].denominators.tokens == 11
    assert resolve(batch.metrics)["frac_reward_zero_std"] == 0.5


@pytest.mark.parametrize("settings", [{"kl": {"coef": 0.1}}, {"entropy": {"coef": 0.01}}])
def test_with_kl_or_entropy_every_row_learns(make_group: Any, settings: dict[str, float]) -> None:
    batch = build([make_group(0, [1.0, 1.0])], **settings)  # pyright: ignore[reportArgumentType]
    assert len(rows(batch, backward=True)) == 2


def test_a_top_entropy_filter_alone_lets_no_row_learn_without_advantage(make_group: Any) -> None:
    batch = build([make_group(0, [1.0, 1.0])], entropy={"top_fraction": 0.5})
    assert rows(batch, backward=True) == []
    assert len(rows(batch, backward=False)) == 2


def test_truncated_completions_are_masked_out_of_loss_and_denominators_but_shape_the_baseline(make_group: Any) -> None:
    group = make_group(0, [1.0, 0.0, 0.0], [2, 3, 7])  # 6 tokens and more end by "length"
    kept, masked = build([group]), build([group], overlong="mask")
    assert kept.credit == masked.credit
    assert kept.credit != build([make_group(0, [1.0, 0.0], [2, 3])]).credit
    assert [len(r.token_ids) for r in rows(kept, backward=True)] == [2, 3, 7]
    assert [len(r.token_ids) for r in rows(masked, backward=True)] == [2, 3]
    assert masked.minibatches[0].denominators.tokens == 5
    assert masked.minibatches[0].denominators.sequences == 2
    assert resolve(masked.metrics)["completions/clipped_ratio"] == pytest.approx(1 / 3)


def test_a_batch_of_truncated_completions_is_empty(make_group: Any) -> None:
    batch = build([make_group(0, [1.0, 0.0], [6, 7])], overlong="mask")
    assert batch.minibatches[0].rows == batch.minibatches[0].measured == ()
    assert batch.minibatches[0].denominators.tokens == 0


def with_reference(group: RolloutGroup, *gaps: float) -> RolloutGroup:
    """Each rollout's reference log-probs lie `gap` below the sampler's, at every token."""
    rollouts = [
        replace(r, scores={REFERENCE: tuple(x - gap for x in r.logprobs)})
        for r, gap in zip(group.rollouts, gaps, strict=True)
    ]
    return replace(group, rollouts=tuple(rollouts))


def test_a_kl_in_the_reward_lowers_each_reward_by_its_completions_sum(make_group: Any) -> None:
    group = with_reference(make_group(0, [1.0, 1.0], [2, 3]), 0.1, 0.2)
    batch = build([group], kl={"coef": 0.5, "place": "reward"}, name="dr_grpo")
    # 1 - 0.5 * 2 * 0.1 = 0.9 and 1 - 0.5 * 3 * 0.2 = 0.7, less their mean
    assert batch.credit[0] == pytest.approx((0.1, -0.1))
    found = resolve(batch.metrics)
    assert found["reward"] == 1.0
    assert found["reward_kl_penalty"] == pytest.approx(0.2)
    (first, _) = rows(batch, backward=True)
    assert first.ref_logprobs == pytest.approx((-0.6, -0.61))


def test_a_kl_in_the_reward_starts_from_the_recomputed_logprobs_where_there_are_any(make_group: Any) -> None:
    group = with_reference(make_group(0, [1.0, 1.0], [2, 2]), 0.1, 0.1)
    first = replace(group.rollouts[0], old_logprobs=tuple(x + 0.3 for x in group.rollouts[0].logprobs))
    batch = build(
        [replace(group, rollouts=(first, group.rollouts[1]))], kl={"coef": 1.0, "place": "reward"}, name="dr_grpo"
    )
    assert batch.credit[0] == pytest.approx((-0.3, 0.3))
    assert rows(batch, backward=True)[0].old_logprobs == first.old_logprobs


def test_failed_rollouts_have_no_kl(make_group: Any) -> None:
    group = make_group(0, [1.0, "failed", 0.0], [2, 2, 2])
    rollouts = [replace(r, scores={REFERENCE: r.logprobs}) if r.reward is not None else r for r in group.rollouts]
    batch = build([replace(group, rollouts=tuple(rollouts))], kl={"coef": 0.5, "place": "reward"}, name="dr_grpo")
    assert batch.credit[0] == pytest.approx((0.5, 0.0, -0.5))
    assert resolve(batch.metrics)["reward_kl_penalty"] == 0.0


@pytest.mark.parametrize(
    ("settings", "rewards", "expected"),
    [
        ({}, [1.0, 0.0], True),
        ({}, [1.0, 1.0], False),
        ({}, [1.0, None], False),
        ({}, ["failed", "failed"], False),
        ({"name": "pass_k", "advantage": {"k": 2, "threshold": 0.5}}, [0.1, 0.2, 0.3], False),
        ({"name": "pass_k", "advantage": {"k": 2, "threshold": 0.5}}, [0.1, 0.2, 0.9], True),
        ({"name": "reinforce_pp_baseline"}, [0.3, 0.3], False),
        ({"advantage": {"scale": "batch"}}, [0.3, 0.4], True),
    ],
)
def test_a_group_teaches_where_it_has_an_advantage(
    make_group: Any, settings: dict[str, Any], rewards: list[Any], expected: bool
) -> None:
    algorithm = build_algorithm(AlgorithmConfig.model_validate(settings))
    assert teaches(make_group(0, rewards), algorithm, reward_weights={"r": 1.0}) is expected


def test_dropped_groups_are_measured_and_not_learned(make_group: Any) -> None:
    shape, algorithm = BatchShape(1, 9), build_algorithm(AlgorithmConfig.model_validate({}))
    dropped = [make_group(1, [0.0, 0.0], [4, 4])]
    batch = build_batch([make_group(0, [1.0, 0.0])], algorithm, shape=shape, reward_weights={"r": 1.0}, dropped=dropped)
    assert {r.group for r in rows(batch, backward=True)} == {0}
    assert rows(batch, backward=False) == []
    assert batch.minibatches[0].denominators.sequences == 2
    found = resolve(batch.metrics)
    assert found["reward"] == 0.25
    assert found["frac_reward_zero_std"] == 0.5
    ledger = list(ledger_rows(batch.groups, step=1, dropped=batch.dropped))
    assert [(row["group"], row["learned"]) for row in ledger] == [(0, True), (1, False)]
    assert [row["group"] for row in trajectory_rows(batch, step=1)] == [0, 0, 1, 1]


def test_nothing_usable_gives_an_empty_mini_batch(make_group: Any) -> None:
    batch = build([make_group(0, [None, "failed"]), make_group(1, ["failed", "failed"])])
    assert batch.minibatches[0].rows == batch.minibatches[0].measured == ()
    assert batch.minibatches[0].denominators.tokens == 0
    found = resolve(batch.metrics)
    assert found["rollout/failed"] == 3
    assert "reward" not in found
    assert "reward_std" not in found
    assert batch.credit == ((0.0, 0.0), (0.0, 0.0))


def test_one_reward_in_a_group_is_compared_with_nothing(make_group: Any) -> None:
    batch = build([make_group(0, [1.0, None])])
    assert batch.credit == ((0.0, 0.0),)
    found = resolve(batch.metrics)
    assert found["reward"] == 1.0
    assert "reward_std" not in found


@pytest.mark.parametrize(("count", "steps", "sizes"), [(4, 2, [2, 2]), (5, 2, [2, 3]), (3, 3, [1, 1, 1]), (5, 1, [5])])
def test_shares_are_contiguous_whole_groups(make_group: Any, count: int, steps: int, sizes: list[int]) -> None:
    batch = build([make_group(k, [1.0, 0.0]) for k in range(count)], steps=steps)
    found = [sorted({r.group for r in mini.rows}) for mini in batch.minibatches]
    assert [len(share) for share in found] == sizes
    assert [group for share in found for group in share] == list(range(count))
    assert [mini.denominators.sequences for mini in batch.minibatches] == [2.0 * size for size in sizes]


def test_more_steps_than_groups_leave_some_steps_empty(make_group: Any) -> None:
    batch = build([make_group(0, [1.0, 0.0])], steps=2)
    assert [len(mini.rows) for mini in batch.minibatches] == [0, 2]
    assert [mini.denominators.tokens for mini in batch.minibatches] == [0, 5]


def test_each_pass_has_the_same_mini_batches(make_group: Any) -> None:
    groups = [make_group(index, [1.0, 0.0]) for index in range(4)]
    algorithm = build_algorithm(AlgorithmConfig.model_validate({}))
    shape = BatchShape(2, 9, passes_per_batch=3)
    minibatches = build_batch(groups, algorithm, shape=shape, reward_weights={"r": 1.0}).minibatches
    assert len(minibatches) == 6
    assert minibatches[:2] == minibatches[2:4] == minibatches[4:]
    assert minibatches[0] != minibatches[1]


def test_length_metrics(make_group: Any) -> None:
    found = resolve(build([make_group(0, [1.0, 0.0, 0.5, "failed"], [2, 3, 7, 4])]).metrics)
    assert found["completions/mean_length"] == 4
    assert found["completions/min_length"] == 2
    assert found["completions/max_length"] == 7
    assert found["completions/clipped_ratio"] == 0.25
    assert found["completions/mean_terminated_length"] == 2.5
    assert found["reward_std"] == pytest.approx(0.5)


def test_usable_samples_are_those_that_could_be_learned_from(make_group: Any) -> None:
    group = make_group(0, [1.0, "failed", None, 0.0, 0.0], [2, 3, 4, 6, 2])
    rollouts = (*group.rollouts[:4], replace(group.rollouts[4], cause="reward 'r' failed: KeyError"))
    groups = [replace(group, rollouts=rollouts), make_group(1, [0.0, 0.0], [2, 2])]
    found = usable_samples(groups, build_algorithm(AlgorithmConfig.model_validate({})))
    assert found.count == 4  # equal rewards teach nothing, and are no failure
    assert found.causes == [
        "engine: out of memory",
        "no reward function gave a value",
        "reward 'r' failed: KeyError",
    ]
    masked = usable_samples(groups, build_algorithm(AlgorithmConfig.model_validate({"overlong": "mask"})))
    assert masked.count == 3
    assert [cause for cause in masked.causes if "cut off at rollout.max_completion_tokens" in cause]


def test_a_mean_of_nothing_is_left_out(make_group: Any) -> None:
    batch = build([make_group(0, [None, None])], kl={"coef": 0.1, "place": "reward"})
    assert "reward_kl_penalty" in batch.metrics
    assert "reward_kl_penalty" not in resolve(batch.metrics)
    assert resolve({"a": Mean(0.0, 0.0), "b": Mean(math.nan, 1.0)}).keys() == {"b"}
