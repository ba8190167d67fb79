"""The split of rows into micro-batches: nothing lost, nothing over the budget, groups whole where they fit."""

from __future__ import annotations

from collections import Counter, defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from groupwise.batches import TrainingRow
from groupwise.inputs import ModelInput
from groupwise.model.forward.packing import pack
from groupwise.policy.microbatches import MicroBatch, split_rows


def row(group: int, prompt: int, length: int, name: int = 0) -> TrainingRow:
    return TrainingRow(
        group,
        ModelInput.of((1,) * prompt),
        ModelInput.of((name % 50 + 2,) * length),
        (1,) * length,
        (1.0,) * length,
        (0.0,) * length,
    )


def cost(microbatch: MicroBatch) -> int:
    """Tokens as they are computed: each group's prompt once."""
    prompts = {r.group: len(r.prompt_ids) for r in microbatch.rows}
    return sum(prompts.values()) + sum(len(r.token_ids) for r in microbatch.rows)


@st.composite
def row_lists(draw: st.DrawFn) -> list[TrainingRow]:
    rows = []
    for group in range(draw(st.integers(0, 5))):
        prompt = draw(st.integers(1, 12))
        rows += [row(group, prompt, n) for n in draw(st.lists(st.integers(1, 30), min_size=1, max_size=6))]
    return [
        TrainingRow(
            r.group,
            ModelInput.of(r.prompt_ids),
            ModelInput.of(r.token_ids),
            r.loss_mask,
            (float(i),) * len(r.token_ids),
            r.logprobs,
        )
        for i, r in enumerate(rows)
    ]


@given(rows=row_lists(), budget=st.integers(1, 80))
def test_every_row_exactly_once(rows: list[TrainingRow], budget: int) -> None:
    placed = Counter(r.advantages[0] for microbatch in split_rows(rows, budget) for r in microbatch.rows)
    assert placed == Counter(float(i) for i in range(len(rows)))


@given(rows=row_lists(), budget=st.integers(1, 80))
def test_the_budget_holds_and_a_longer_row_stands_alone(rows: list[TrainingRow], budget: int) -> None:
    for microbatch in split_rows(rows, budget):
        if cost(microbatch) > budget:
            assert len(microbatch.rows) == 1
            assert microbatch.rows[0].num_tokens > budget


@given(rows=row_lists(), budget=st.integers(1, 80))
def test_a_group_that_fits_is_in_one_place(rows: list[TrainingRow], budget: int) -> None:
    groups: dict[int, list[TrainingRow]] = defaultdict(list)
    for r in rows:
        groups[r.group].append(r)
    microbatches = split_rows(rows, budget)
    for group, members in groups.items():
        whole = len(members[0].prompt_ids) + sum(len(r.token_ids) for r in members) <= budget
        places = sum(any(r.group == group for r in microbatch.rows) for microbatch in microbatches)
        assert places == 1 if whole else places >= 1


@given(rows=row_lists(), budget=st.integers(1, 80))
def test_rows_of_one_prompt_are_neighbours(rows: list[TrainingRow], budget: int) -> None:
    for microbatch in split_rows(rows, budget):
        order = [r.group for r in microbatch.rows]
        assert order == [group for group in dict.fromkeys(order) for _ in range(order.count(group))]
        assert len(pack(microbatch.rows).targets) == sum(len(r.token_ids) for r in microbatch.rows)


@given(rows=row_lists(), budget=st.integers(1, 80))
def test_the_split_is_a_function_of_its_arguments(rows: list[TrainingRow], budget: int) -> None:
    assert split_rows(rows, budget) == split_rows(list(rows), budget)


def test_two_parts_of_a_group_that_meet_stand_side_by_side() -> None:
    rows = [row(0, 1, n) for n in (4, 19, 2)] + [row(1, 1, 3)]  # a group in three pieces: 5, 20 and 3 tokens
    assert [[r.group for r in m.rows] for m in split_rows(rows, 20)] == [[0], [0, 0, 1]]


def test_one_long_row_lifts_no_other_over_the_budget() -> None:
    rows = [row(0, 2, 100), *(row(g, 2, 8) for g in range(1, 9))]
    sizes = sorted(cost(m) for m in split_rows(rows, 20))
    assert sizes == [20, 20, 20, 20, 102]


def test_micro_batches_are_of_about_equal_size() -> None:
    sizes = [cost(m) for m in split_rows([row(g, 1, 9) for g in range(10)], 60)]
    assert sizes == [50, 50]


def test_a_shared_prompt_counts_once() -> None:
    assert len(split_rows([row(0, 50, 10) for _ in range(4)], 90)) == 1


def test_no_rows_give_no_micro_batch() -> None:
    assert split_rows([], 10) == ()


@given(rows=row_lists(), budget=st.integers(1, 80), streams=st.integers(1, 3))
def test_streams_change_neither_rows_nor_budget(rows: list[TrainingRow], budget: int, streams: int) -> None:
    microbatches = split_rows(rows, budget, streams=streams)
    placed = Counter(r.advantages[0] for microbatch in microbatches for r in microbatch.rows)
    assert placed == Counter(float(i) for i in range(len(rows)))
    assert all(cost(m) <= budget or len(m.rows) == 1 for m in microbatches)
    for microbatch in microbatches:
        pack(microbatch.rows)


@pytest.mark.parametrize(
    ("rows", "budget", "sizes"),
    [
        ([row(g, 1, 9) for g in range(8)], 1000, [40, 40]),  # one pass would do
        ([row(g, 1, 9) for g in range(8)], 30, [20, 20, 20, 20]),  # three would do
        ([row(0, 2, 9) for _ in range(6)], 1000, [29, 29]),  # a single group is divided, its prompt computed twice
        ([row(0, 1, 9)], 1000, [10]),
    ],
)
def test_every_lane_has_its_share(rows: list[TrainingRow], budget: int, sizes: list[int]) -> None:
    assert [cost(m) for m in split_rows(rows, budget, streams=2)] == sizes


@pytest.mark.parametrize("backward", [True, False])
def test_backward_is_handed_on(backward: bool) -> None:
    assert [m.backward for m in split_rows([row(0, 1, 2)], 1, backward=backward)] == [backward]
