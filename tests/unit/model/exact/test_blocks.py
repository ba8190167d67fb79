"""Attention in blocks against plain softmax, and its promise: a row's bits do not depend on its company."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from groupwise.model.exact.blocks import (
    BLOCK,
    TILE,
    Found,
    KeyBlock,
    Mask,
    Scores,
    causal_blocks,
    prefix_blocks,
    score,
    width_of,
)

SIZE = 12
SCALE = 0.3


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def finish(part: Found) -> Tensor:
    return part.out / part.mass[..., None]


def add_up(first: Scores, second: Scores, rows: int) -> Found:
    """Both segments' first `rows` rows together; the others keep a maximum of their own."""
    top = torch.maximum(first.found.top[:, :rows], second.found.top[:, :rows])
    one, other = (x.sum(torch.cat([top, x.found.top[:, rows:]], 1)) for x in (first, second))
    return Found(top, one.mass[:, :rows] + other.mass[:, :rows], one.out[:, :rows] + other.out[:, :rows])


def plain(query: Tensor, key: Tensor, value: Tensor, seen: Tensor) -> Tensor:
    scores = (query @ key.transpose(1, 2)) * SCALE
    return scores.masked_fill(~seen, -math.inf).softmax(-1) @ value


def padded(x: Tensor, multiple: int = BLOCK) -> Tensor:
    return torch.nn.functional.pad(x, (0, 0, 0, -x.shape[1] % multiple))


@settings(max_examples=25)
@given(
    length=st.integers(1, 200),
    repeat=st.sampled_from([1, 2, 4]),
    window=st.one_of(st.none(), st.integers(1, 150)),
    seed=st.integers(0, 5),
)
def test_causal_attention_is_softmax_attention(length: int, repeat: int, window: int | None, seed: int) -> None:
    key, value = randn(2, length, SIZE, seed=seed), randn(2, length, SIZE, seed=seed + 9)
    query = randn(2, length * repeat, SIZE, seed=seed + 5) * 3
    blocks = causal_blocks(padded(key), padded(value), repeat, window)
    out = finish(score(padded(query, BLOCK * repeat), blocks, SCALE).sum())[:, : length * repeat]
    row, column = torch.arange(length).repeat_interleave(repeat)[:, None], torch.arange(length)
    seen = (column <= row) & (row - column < (window or length))
    torch.testing.assert_close(out, plain(query, key, value, seen), rtol=1e-12, atol=1e-12)


@settings(max_examples=25)
@given(
    prompt=st.integers(1, 140),
    rows=st.integers(1, 9),
    window=st.one_of(st.none(), st.integers(1, 160)),
    seed=st.integers(0, 5),
)
def test_two_segments_add_up_to_one_softmax(prompt: int, rows: int, window: int | None, seed: int) -> None:
    """Rows that follow the prompt, each seeing it and a segment of its own, as in decoding."""
    key, value = randn(3, prompt + rows, SIZE, seed=seed), randn(3, prompt + rows, SIZE, seed=seed + 9)
    query = randn(3, rows, SIZE, seed=seed + 5) * 3
    at = torch.arange(prompt, prompt + rows)
    tiled = padded(query, TILE)
    distance = torch.nn.functional.pad(at, (0, -rows % TILE))
    prefix = prefix_blocks(padded(key[:, :prompt]), padded(value[:, :prompt]), prompt, distance, window)
    shared = score(tiled, prefix, SCALE)
    own_blocks = causal_blocks(padded(key[:, prompt:]), padded(value[:, prompt:]), 1, window)
    own = score(padded(query), own_blocks, SCALE)
    column = torch.arange(prompt + rows)
    seen = (column <= at[:, None]) & (at[:, None] - column < (window or prompt + rows))
    both = finish(add_up(shared, own, rows))
    torch.testing.assert_close(both, plain(query, key, value, seen), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_row_has_the_same_bits_among_any_rows_heads_and_padding(
    dtype: torch.dtype, number: int, threads: Callable[[int], None]
) -> None:
    threads(number)
    prompt = 100
    key, value = randn(9, prompt, SIZE, dtype=dtype), randn(9, prompt, SIZE, seed=1, dtype=dtype)
    query = randn(9, 40, SIZE, seed=2, dtype=dtype) * 3

    def attend(heads: slice, rows: slice, blocks: int) -> tuple[Tensor, Found]:
        missing = blocks * BLOCK - prompt
        k, v = (torch.nn.functional.pad(x[heads], (0, 0, 0, missing)).contiguous() for x in (key, value))
        met = score(query[heads, rows].contiguous(), prefix_blocks(k, v, prompt, None, None), SCALE)
        return met.found.top, met.sum()

    top, whole = attend(slice(0, 9), slice(0, 40), 2)
    for heads in (slice(0, 1), slice(3, 5), slice(8, 9)):
        for rows in (slice(0, 4), slice(4, 24), slice(36, 40)):
            for blocks in (2, 5):
                part_top, part = attend(heads, rows, blocks)
                assert torch.equal(part_top, top[heads, rows])
                assert torch.equal(part.out, whole.out[heads, rows])
                assert torch.equal(part.mass, whole.mass[heads, rows])


def test_hidden_keys_weigh_exactly_nothing() -> None:
    """Whatever stands in a hidden key, however large, leaves every bit as it is."""
    key, value = padded(randn(1, 70, SIZE, dtype=torch.float32)), padded(randn(1, 70, SIZE, dtype=torch.float32))
    query = randn(1, 4, SIZE, dtype=torch.float32)
    quiet = score(query, prefix_blocks(key, value, 70, None, None), SCALE).sum()
    key[:, 70:], value[:, 70:] = 1e4, -1e4
    loud = score(query, prefix_blocks(key, value, 70, None, None), SCALE).sum()
    assert torch.equal(quiet.out, loud.out)
    assert torch.equal(quiet.mass, loud.mass)


def test_a_segment_wholly_out_of_the_window_counts_for_nothing() -> None:
    key, value = randn(1, BLOCK, SIZE, dtype=torch.float32), randn(1, BLOCK, SIZE, dtype=torch.float32)
    query = randn(1, 4, SIZE, dtype=torch.float32)

    def near() -> Scores:
        return score(query, prefix_blocks(key, value, 5, None, None), SCALE)

    far = score(query, prefix_blocks(key, value, 10, torch.full((4,), 500), 20), SCALE)
    both, own = add_up(far, near(), 4), near().sum()
    assert torch.equal(both.out, own.out)
    assert torch.equal(both.mass, own.mass)
    assert torch.isfinite(both.out).all()


def test_scores_far_apart_neither_overflow_nor_vanish() -> None:
    key, value = randn(1, BLOCK, SIZE, dtype=torch.float32), randn(1, BLOCK, SIZE, dtype=torch.float32)
    query = randn(1, 4, SIZE, dtype=torch.float32) * 1e4
    out = finish(score(query, prefix_blocks(key, value, BLOCK, None, None), 1.0).sum())
    best = (query @ key.transpose(1, 2)).argmax(-1)
    torch.testing.assert_close(out[0], value[0][best[0]])


def test_rows_must_come_in_tiles_and_keys_in_blocks() -> None:
    key = randn(1, BLOCK, SIZE)
    with pytest.raises(AssertionError, match="multiple of 4"):
        score(randn(1, 3, SIZE), prefix_blocks(key, key, BLOCK, None, None), SCALE)
    with pytest.raises(AssertionError, match="multiple of 64"):
        causal_blocks(key[:, :10], key[:, :10], 1, None)
    with pytest.raises(AssertionError, match="sliding window needs"):
        prefix_blocks(key, key, 3, None, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [16, 48, 64, 128])
@pytest.mark.parametrize("rows", [TILE, 2 * TILE, 256])
def test_keys_that_no_row_sees_may_be_left_out(rows: int, size: int, dtype: torch.dtype) -> None:
    query, key, value = (randn(32, n, size, seed=i).to(dtype) for i, n in enumerate((rows, BLOCK, BLOCK)))
    for keys in range(1, BLOCK):
        width = width_of(keys)
        hidden = (torch.arange(BLOCK) >= keys)[None, None]
        blocks = [
            KeyBlock(key[:, :w], value[:, :w], 0, Mask.of(hidden[..., :w], dtype) if keys < w else None)
            for w in (BLOCK, width)
        ]
        whole, short = (score(query, [block], SCALE) for block in blocks)
        assert width < BLOCK or keys > 32
        assert torch.equal(whole.found.top, short.found.top), keys
        found, same = whole.sum(), short.sum()
        for a, b in ((found.out, same.out), (found.mass, same.mass)):
            assert torch.equal(a, b), keys
