"""Advantages against loops written from the equations, and what must hold for any rewards."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from groupwise.algorithms import AdvantageInputs, build_algorithm
from groupwise.algorithms.advantages.pass_k import pass_k
from groupwise.config import AlgorithmConfig

NAN = math.nan
EPS = 1e-4
VARIANTS = (
    {"name": "grpo"},
    {"name": "grpo", "advantage": {"scale": "batch"}},
    {"name": "dr_grpo"},
    {"name": "rloo"},
    {"name": "reinforce_pp"},
    {"name": "reinforce_pp_baseline"},
    {"name": "opo"},
    {"name": "maxrl"},
    {"name": "pass_k", "advantage": {"k": 2}},
    {"name": "gdpo"},
)


def config_of(**settings: Any) -> AlgorithmConfig:
    return AlgorithmConfig.model_validate(settings)


def inputs_of(groups, lengths=None, components=None, weights=(1.0,)):
    rewards = tuple(torch.tensor(group, dtype=torch.float64) for group in groups)
    if components is None:
        components = tuple(group[:, None] for group in rewards)
    else:
        components = tuple(torch.tensor(group, dtype=torch.float64) for group in components)
    if lengths is None:
        lengths = [[float(3 + index) for index in range(len(group))] for group in groups]
    return AdvantageInputs(rewards, components, weights, tuple(torch.tensor(group).double() for group in lengths))


def advantages_of(inputs, **config):
    return [group.tolist() for group in build_algorithm(config_of(**config)).advantages(inputs)]


def flat(groups):
    return [value for group in groups for value in group]


def mean(values):
    return sum(values) / len(values)


def std(values):
    centre = mean(values)
    return math.sqrt(sum((value - centre) ** 2 for value in values) / (len(values) - 1))


def ref_grpo(groups, lengths):
    return [[(r - mean(g)) / (std(g) + EPS) for r in g] for g in groups]


def ref_grpo_batch(groups, lengths):
    spread = std(flat(groups))
    return [[(r - mean(g)) / (spread + EPS) for r in g] for g in groups]


def ref_dr_grpo(groups, lengths):
    return [[r - mean(g) for r in g] for g in groups]


def ref_rloo(groups, lengths):
    return [[g[i] - mean(g[:i] + g[i + 1 :]) for i in range(len(g))] for g in groups]


def ref_reinforce_pp(groups, lengths):
    batch = flat(groups)
    return [[(r - mean(batch)) / (std(batch) + EPS) for r in g] for g in groups]


def ref_reinforce_pp_baseline(groups, lengths):
    return ref_reinforce_pp(ref_dr_grpo(groups, lengths), lengths)


def ref_opo(groups, lengths):
    result = []
    for g, sizes in zip(groups, lengths, strict=True):
        baseline = sum(r * n for r, n in zip(g, sizes, strict=True)) / sum(sizes)
        result.append([r - baseline for r in g])
    return result


def ref_maxrl(groups, lengths):
    return [[(r - mean(g)) / mean(g) for r in g] for g in groups]


def ref_pass_k_enumerated(group, k):
    """The equation's origin, by listing every subset: mean over subsets with i of (best of subset - R) / s."""
    subsets = list(itertools.combinations(range(len(group)), k))
    best = [max(group[i] for i in subset) for subset in subsets]
    centre = mean(best)
    spread = math.sqrt(mean([(b - centre) ** 2 for b in best]))
    return [
        mean([(b - centre) / spread for b, subset in zip(best, subsets, strict=True) if i in subset])
        for i in range(len(group))
    ]


@pytest.mark.parametrize(
    ("config", "reference"),
    [
        ({"name": "grpo"}, ref_grpo),
        ({"name": "grpo", "advantage": {"scale": "batch"}}, ref_grpo_batch),
        ({"name": "dr_grpo"}, ref_dr_grpo),
        ({"name": "rloo"}, ref_rloo),
        ({"name": "reinforce_pp"}, ref_reinforce_pp),
        ({"name": "reinforce_pp_baseline"}, ref_reinforce_pp_baseline),
        ({"name": "opo"}, ref_opo),
        ({"name": "maxrl"}, ref_maxrl),
    ],
)
def test_advantages_equal_their_equations_and_ignore_rollouts_without_reward(config, reference):
    groups = [[1.0, 0.0, 0.25, 0.0], [2.0, 0.5, 1.5], [0.0, 1.0]]
    lengths = [[4.0, 10.0, 3.0, 8.0], [5.0, 1.0, 2.0], [7.0, 7.0]]
    want = reference(groups, lengths)
    with_holes = [[NAN, *groups[0]], [*groups[1], NAN, NAN], groups[2], [NAN, NAN]]
    holed_lengths = [[99.0, *lengths[0]], [*lengths[1], 99.0, 98.0], lengths[2], [1.0, 2.0]]

    np.testing.assert_allclose(flat(advantages_of(inputs_of(groups, lengths), **config)), flat(want), rtol=1e-12)
    got = advantages_of(inputs_of(with_holes, holed_lengths), **config)
    np.testing.assert_allclose(got[0], [0.0, *want[0]], rtol=1e-12)
    np.testing.assert_allclose(got[1], [*want[1], 0.0, 0.0], rtol=1e-12)
    assert got[3] == [0.0, 0.0]


@pytest.mark.parametrize(("right", "size", "k"), [(1, 4, 2), (2, 5, 3), (3, 6, 2), (1, 8, 4), (4, 8, 1)])
def test_pass_k_equals_the_enumeration_of_all_subsets(right, size, k):
    group = [1.0] * right + [0.0] * (size - right)
    got = advantages_of(inputs_of([group]), name="pass_k", advantage={"k": k})[0]
    np.testing.assert_allclose(got, ref_pass_k_enumerated(group, k), rtol=1e-12)


def test_pass_k_is_exactly_zero_where_every_subset_agrees():
    groups = [[0.0] * 4, [1.0] * 4, [1.0, 1.0, 1.0, 0.0], [0.5, 0.9, 0.0, 0.0]]
    got = advantages_of(inputs_of(groups), name="pass_k", advantage={"k": 2})
    assert got[0] == got[1] == got[2] == [0.0] * 4
    assert got[3][0] == got[3][1] > 0 > got[3][2]
    assert advantages_of(inputs_of([[1.0, 0.0]]), name="pass_k", advantage={"k": 9})[0] == [0.0, 0.0]


def test_pass_k_threshold_decides_what_is_right():
    inputs = inputs_of([[0.1, 0.1, 0.1, 1.0]])
    assert pass_k(inputs, k=2, threshold=0.0)[0].tolist() == [0.0] * 4
    assert pass_k(inputs, k=2, threshold=0.5)[0][3] > 0


def test_gdpo_equals_its_equations():
    components = [[[1.0, 100.0], [0.0, 300.0], [1.0, 200.0]], [[0.0, 50.0], [1.0, 50.0]]]
    weights = (1.0, 0.5)
    sums = []
    for group in components:
        total = [0.0] * len(group)
        for k, weight in enumerate(weights):
            column = [row[k] for row in group]
            if max(column) > min(column):
                for i, value in enumerate(column):
                    total[i] += weight * (value - mean(column)) / (std(column) + EPS)
        sums.append(total)
    summed = flat(sums)
    want = [(value - mean(summed)) / (std(summed) + EPS) for value in summed]
    rewards = [[sum(w * v for w, v in zip(weights, row, strict=True)) for row in group] for group in components]
    got = advantages_of(inputs_of(rewards, components=components, weights=weights), name="gdpo")
    np.testing.assert_allclose(flat(got), want, rtol=1e-10, atol=1e-12)


def test_gdpo_leaves_out_missing_values_and_rollouts_without_reward():
    components = [[[1.0, NAN], [0.0, NAN], [0.0, 7.0], [9.0, 9.0]]]
    got = advantages_of(inputs_of([[1.0, 0.0, 7.0, NAN]], components=components, weights=(1.0, 1.0)), name="gdpo")[0]
    alone = advantages_of(inputs_of([[1.0, 0.0, 0.0]]), name="gdpo")[0]
    np.testing.assert_allclose(got, [*alone, 0.0], rtol=1e-12)


def test_maxrl_for_negative_rewards_keeps_sign_and_bound():
    got = advantages_of(inputs_of([[1.0, -1.0 + 1e-12, 0.0, -0.5]]), name="maxrl")[0]
    assert got[0] > 0 > got[1]
    assert max(abs(value) for value in got) <= 2 * len(got)


def test_opo_without_any_token_uses_the_plain_mean():
    assert advantages_of(inputs_of([[1.0, 0.0]], lengths=[[0.0, 0.0]]), name="opo") == [[0.5, -0.5]]


@pytest.mark.parametrize("config", VARIANTS, ids=str)
def test_equal_rewards_give_exactly_zero(config):
    # 0.1 has no exact mean in binary: eps alone would leave rounding behind.
    groups = [[0.1] * 7, [0.1] * 3 + [NAN], [0.1], [NAN], []]
    got = advantages_of(inputs_of(groups), **config)
    assert got == [[0.0] * len(group) for group in groups]


@pytest.mark.parametrize("config", [c for c in VARIANTS if c["name"] != "reinforce_pp"], ids=str)
def test_a_solved_group_is_exactly_zero_beside_another(config):
    got = advantages_of(inputs_of([[0.1] * 3, [1.0, 0.0, 0.0]]), **config)
    assert got[0] == [0.0] * 3
    assert got[1][0] > 0 > got[1][1]


@pytest.mark.parametrize("config", VARIANTS, ids=str)
def test_no_group_at_all(config):
    assert build_algorithm(config_of(**config)).advantages(inputs_of([])) == ()


rewards = st.one_of(
    st.floats(allow_nan=True, allow_infinity=False),
    st.floats(-1, 1),
    st.sampled_from([0.0, 1.0, NAN, 1e308, -1e308, 5e-324]),
)
batches = st.lists(st.lists(rewards, min_size=0, max_size=6), min_size=1, max_size=4)


@pytest.mark.parametrize("config", VARIANTS, ids=str)
@settings(max_examples=60, deadline=None)
@given(groups=batches)
def test_any_finite_rewards_give_finite_advantages(config, groups):
    for got, group in zip(advantages_of(inputs_of(groups), **config), groups, strict=True):
        for advantage, reward in zip(got, group, strict=True):
            assert math.isfinite(advantage)
            assert not (math.isnan(reward) and advantage != 0.0)
            assert abs(advantage) < 3e38, "must fit into float32"


plain = st.lists(st.lists(st.floats(-10, 10), min_size=1, max_size=6), min_size=1, max_size=4)


@pytest.mark.parametrize("config", [c for c in VARIANTS if c["name"] not in ("opo", "reinforce_pp")], ids=str)
@settings(max_examples=40, deadline=None)
@given(groups=plain)
def test_a_group_sums_to_zero(config, groups):
    for group in advantages_of(inputs_of(groups), **config):
        assert sum(group) == pytest.approx(0, abs=1e-8)


@settings(max_examples=40, deadline=None)
@given(groups=plain)
def test_reinforce_pp_sums_to_zero_over_the_batch_and_opo_by_length(groups):
    inputs = inputs_of(groups)
    assert sum(flat(advantages_of(inputs, name="reinforce_pp"))) == pytest.approx(0, abs=1e-8)
    for group, lengths in zip(advantages_of(inputs, name="opo"), inputs.lengths, strict=True):
        assert sum(a * n for a, n in zip(group, lengths.tolist(), strict=True)) == pytest.approx(0, abs=1e-8)


@pytest.mark.parametrize("config", VARIANTS, ids=str)
def test_order_within_a_group_does_not_matter(config):
    group, order = [1.0, 0.0, 0.25, NAN, 0.0], [4, 3, 0, 2, 1]
    lengths = [4.0, 10.0, 3.0, 8.0, 10.0]
    got = advantages_of(inputs_of([group], [lengths]), **config)[0]
    shuffled = advantages_of(inputs_of([[group[i] for i in order]], [[lengths[i] for i in order]]), **config)[0]
    np.testing.assert_allclose(shuffled, [got[i] for i in order], rtol=1e-12, atol=1e-15)


def test_inputs_refuse_infinite_rewards_and_wrong_shapes():
    with pytest.raises(AssertionError, match="infinite"):
        inputs_of([[math.inf, 0.0]])
    with pytest.raises(AssertionError, match="components"):
        inputs_of([[1.0, 0.0]], components=[[[1.0]]])
    with pytest.raises(AssertionError, match="lengths"):
        inputs_of([[1.0, 0.0]], lengths=[[1.0]])
