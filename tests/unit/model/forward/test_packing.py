from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from groupwise.batches import TrainingRow
from groupwise.inputs import ModelInput
from groupwise.model.forward.packed_attention import make_plan
from groupwise.model.forward.packing import ROW_MULTIPLE, Packed, Segment, pack, pack_sequences, pad_rows

TOKEN = st.integers(1, 50)
TOKENS = st.lists(TOKEN, min_size=1, max_size=9)
GROUPS = st.lists(st.tuples(TOKENS, st.lists(TOKENS, min_size=1, max_size=4)), min_size=1, max_size=5)


def row(group: int, prompt: list[int], completion: list[int]) -> TrainingRow:
    n = len(completion)
    return TrainingRow(group, ModelInput.of(prompt), ModelInput.of(completion), (1,) * n, (0.0,) * n, (0.0,) * n)


def rows_of(groups: list[tuple[list[int], list[list[int]]]]) -> list[TrainingRow]:
    # Numbers that neither start at zero nor grow: a group's number is a name.
    return [row(90 - 7 * g, prompt, c) for g, (prompt, completions) in enumerate(groups) for c in completions]


def seen_by(packed: Packed, position: int) -> list[int]:
    """What the token at `position` attends to, by the segments' own definition."""
    (home,) = [s for s in packed.segments if s.start <= position < s.stop]
    own = packed.token_ids[home.start : position + 1].tolist()
    if home.prefix is None:
        return own
    prefix = packed.segments[home.prefix]
    return packed.token_ids[prefix.start : prefix.stop].tolist() + own


@given(GROUPS)
def test_every_prediction_sees_its_prompt_and_what_was_written_before(
    groups: list[tuple[list[int], list[list[int]]]],
) -> None:
    rows = rows_of(groups)
    packed = pack(rows)
    wanted = [
        (i, list(r.prompt_ids + r.token_ids[:t]), r.token_ids[t])
        for i, r in enumerate(rows)
        for t in range(len(r.token_ids))
    ]
    assert packed.row.tolist() == [i for i, _, _ in wanted]
    assert packed.targets.tolist() == [target for _, _, target in wanted]
    for predictor, (_, context, _) in zip(packed.predictors.tolist(), wanted, strict=True):
        assert seen_by(packed, predictor) == context
        assert packed.position_ids[predictor] == len(context) - 1


@given(GROUPS)
def test_nothing_is_packed_twice_and_the_rest_is_padding(groups: list[tuple[list[int], list[list[int]]]]) -> None:
    packed = pack(rows_of(groups))
    real = sum(len(prompt) + sum(len(c) - 1 for c in completions) for prompt, completions in groups)
    assert packed.token_ids.shape == packed.position_ids.shape == (-(-real // ROW_MULTIPLE) * ROW_MULTIPLE,)
    assert sum(s.length for s in packed.segments) == real
    assert [s.start for s in packed.segments] == [
        sum(s.length for s in packed.segments[:i]) for i in range(len(packed.segments))
    ]
    assert all(s.length > 0 for s in packed.segments)
    assert not packed.token_ids[real:].any()


def test_the_documented_example() -> None:
    packed = pack([row(0, [1, 2, 3], [7, 8]), row(0, [1, 2, 3], [9])])
    assert packed.token_ids.tolist() == [1, 2, 3, 7] + [0] * 12
    assert packed.position_ids.tolist()[:4] == [0, 1, 2, 3]
    assert packed.predictors.tolist() == [2, 3, 2]
    assert packed.targets.tolist() == [7, 8, 9]
    assert packed.row.tolist() == [0, 0, 1]
    assert packed.segments == (Segment(0, 3), Segment(3, 1, prefix=0))


@given(st.lists(TOKENS, min_size=1, max_size=6))
def test_prompts_alone(prompts: list[list[int]]) -> None:
    packed = pack_sequences([(prompt, ()) for prompt in prompts])
    assert [seen_by(packed, p) for p in packed.predictors.tolist()] == prompts
    assert all(s.prefix is None for s in packed.segments)


@pytest.mark.parametrize("second", [[1, 2, 4], [1, 2]], ids=["same length", "shorter"])
def test_other_prompts_of_a_group_stand_apart(second: list[int]) -> None:
    """As where an environment's beginning differs from sample to sample."""
    packed = pack([row(5, [1, 2, 3], [7, 9]), row(5, second, [8, 9])])
    assert [seen_by(packed, p) for p in packed.predictors.tolist()] == [
        [1, 2, 3],
        [1, 2, 3, 7],
        second,
        [*second, 8],
    ]


def test_a_group_torn_apart_is_refused() -> None:
    packed = pack([row(0, [1], [7, 8]), row(1, [2], [7, 8]), row(0, [1], [9, 9])])
    with pytest.raises(AssertionError, match="neighbours"):
        make_plan(packed, 4)


def test_rows_without_tokens_are_refused_where_they_are_made() -> None:
    with pytest.raises(AssertionError, match="at least one prompt"):
        row(0, [], [1])
    with pytest.raises(AssertionError, match="at least one prompt"):
        row(0, [1], [])


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9])
def test_pad_rows_adds_zero_rows_only(count: int) -> None:
    x = torch.randn(count, 3)
    padded = pad_rows(x)
    assert padded.shape[0] % ROW_MULTIPLE == 0
    assert padded.shape[0] - count < ROW_MULTIPLE
    assert torch.equal(padded[:count], x)
    assert not padded[count:].any()


def test_moving_keeps_every_field() -> None:
    packed = pack([row(0, [1, 2], [3, 4])])
    moved = packed.to(torch.device("cpu"))
    assert moved.segments == packed.segments
    assert all(
        torch.equal(a, b)
        for a, b in [
            (moved.token_ids, packed.token_ids),
            (moved.position_ids, packed.position_ids),
            (moved.predictors, packed.predictors),
            (moved.targets, packed.targets),
            (moved.row, packed.row),
        ]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [16, 32, 48])
def test_a_full_tile_gives_a_row_the_bits_of_any_larger_product(columns: int, dtype: torch.dtype) -> None:
    """Narrow layers are where small products have kernels of their own."""
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        weight = (torch.randn(columns, 32, generator=generator) * 0.2).to(dtype)
        x = torch.randn(512, 32, generator=generator).to(dtype)
        whole = torch.nn.functional.linear(x, weight)
        parts = [torch.nn.functional.linear(rows, weight) for rows in x.split(ROW_MULTIPLE)]
        assert torch.equal(torch.cat(parts), whole)
