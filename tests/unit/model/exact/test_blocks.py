"""Attention in blocks against plain softmax, and its promise: a row's bits do not depend on its company."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from groupwise.model.exact import blocks as blocks_module
from groupwise.model.exact.blocks import (
    BLOCK,
    FINE,
    LARGEST,
    TILE,
    Found,
    KeyBlock,
    Mask,
    Scores,
    block_of,
    block_spans,
    block_start,
    block_starts,
    causal_blocks,
    few_rows,
    full_rows,
    padded_keys,
    prefix_blocks,
    score,
    width_of,
    widths,
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


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 255, 256, 257, 511, 512, 513, 1100])
def test_blocks_are_a_function_of_the_place_alone(tokens: int) -> None:
    spans = block_spans(tokens)
    assert spans[0][0] == 0
    assert spans[-1][1] == tokens
    assert all(one[1] == next_one[0] for one, next_one in itertools.pairwise(spans))
    assert [start for start, _ in spans] == list(block_starts(tokens)) == list(block_starts(5000)[: len(spans)])
    for start, stop in spans[:-1]:
        assert stop - start == (BLOCK if start < FINE else LARGEST)
    for token in {0, tokens // 2, tokens - 1}:
        index = block_of(token)
        assert spans[index][0] == block_start(index) <= token < spans[index][1]


def test_blocks_grow_where_the_texts_say() -> None:
    assert block_starts(1100) == (0, 64, 128, 192, 256, 512, 768, 1024)
    assert block_spans(0) == []
    assert {BLOCK, LARGEST} <= {*widths()} <= {16, 32, 64, 128, 192, 256}
    for keys in range(1, LARGEST + 1):
        assert width_of(keys) == min(width for width in widths() if width >= keys)


def test_segments_are_padded_to_where_blocks_may_end(monkeypatch: pytest.MonkeyPatch) -> None:
    for found, sizes in (
        ((16, 32, 64, 128, 192, 256), {385: 448, 448: 448, 449: 512}),
        ((16, 32, 64, 128, 256), {385: 512, 448: 512, 449: 512}),
        ((64, 256), {1: 64, 257: 320, 321: 512}),
    ):
        monkeypatch.setattr(blocks_module, "widths", lambda found=found: found)
        for tokens, padded_to in {64: 64, 65: 128, 250: 256, 512: 512, 513: 576, **sizes}.items():
            assert padded_keys(tokens) == padded_to
        assert padded_keys(0) == 0


@pytest.mark.parametrize("other", [32, 128, 192])
def test_a_width_that_has_other_sums_is_not_taken(other: int, monkeypatch: pytest.MonkeyPatch) -> None:
    bmm = torch.bmm

    def differs(a: Tensor, b: Tensor, **given: Any) -> Tensor:
        return bmm(a, b, **given) + (1e-6 if a.shape[-1] == other else 0.0)

    monkeypatch.setattr(torch, "bmm", differs)
    assert widths.__wrapped__() == tuple(width for width in widths() if width != other)


@pytest.mark.parametrize("repeat", [1, 2])
@pytest.mark.parametrize("window", [None, 150])
def test_rows_of_a_segment_have_the_same_bits_from_any_of_them_on(repeat: int, window: int | None) -> None:
    """All rows at once, with all of the keys, and some rows with the keys up to them."""
    length = 640
    key, value = (randn(3, length, 16, seed=i, dtype=torch.float32) for i in (1, 2))
    query = randn(3, length * repeat, 16, seed=3, dtype=torch.float32)
    met = score(query, causal_blocks(key, value, repeat, window), SCALE)
    top, whole = met.found.top.clone(), met.sum()
    for first, last in ((0, 64), (64, 128), (128, 320), (320, 576), (576, 640)):
        rows = slice(first * repeat, last * repeat)
        blocks = causal_blocks(key[:2, :last], value[:2, :last], repeat, window, first)
        some = score(query[:2, rows].contiguous(), blocks, SCALE)
        assert torch.equal(some.found.top, top[:2, rows])
        part = some.sum()
        assert torch.equal(part.mass, whole.mass[:2, rows])
        assert torch.equal(part.out, whole.out[:2, rows])


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [16, 48, 64, 128])
@pytest.mark.parametrize("rows", [TILE, 2 * TILE, 256])
def test_keys_that_no_row_sees_may_be_left_out_of_a_large_block(rows: int, size: int, dtype: torch.dtype) -> None:
    """As a cache holds them, in the company of many rows and of few, at every width that there is."""
    key, value = (randn(8, LARGEST, size, seed=i).to(dtype) for i in (1, 2))
    query = randn(8, 256, size, seed=3).to(dtype)
    held = key.transpose(1, 2).contiguous().transpose(1, 2)
    for keys in (1, 15, 16, 17, 33, 64, 65, 127, 128, 129, 191, 192, 193, 255, 256):
        hidden = (torch.arange(LARGEST) >= keys)[None, None]
        whole = score(query, [KeyBlock(key, value, 0, Mask.of(hidden, dtype) if keys < LARGEST else None)], SCALE)
        width = width_of(keys)
        mask = Mask.of(hidden[..., :width], dtype) if keys < width else None
        block = KeyBlock(held[:, :width], value[:, :width], 0, mask)
        short = score(query[:, :rows].contiguous(), [block], SCALE)
        assert torch.equal(whole.found.top[:, :rows], short.found.top), keys
        found, same = whole.sum(), short.sum()
        assert torch.equal(found.mass[:, :rows], same.mass), keys
        assert torch.equal(found.out[:, :rows], same.out), keys


@pytest.mark.parametrize("size", [16, 64, 128])
@pytest.mark.parametrize("rows", [1, 2, 3, 6])
def test_few_rows_have_the_bits_that_they_have_in_company(rows: int, size: int) -> None:
    """Where rows are padded, and where they were found to need none."""
    query = randn(6, 64, size, dtype=torch.float32)
    few = few_rows(rows, query, 6)
    assert few in (rows, full_rows(rows, query, 6))
    value = randn(6, 150, size, seed=2, dtype=torch.float32)
    key = randn(6, size, LARGEST, seed=1, dtype=torch.float32)[:, :, :150].transpose(1, 2)
    hidden = Mask.of((torch.arange(150) >= 140)[None, None], torch.float32)
    blocks = [KeyBlock(key[:, :64], value[:, :64]), KeyBlock(key[:, 64:128], value[:, 64:128])]
    blocks.append(
        KeyBlock(key[:, 128:144], value[:, 128:144], 0, Mask(hidden.bias[..., 128:144], hidden.keep[..., 128:144]))
    )
    many = score(query, blocks, SCALE)
    alone = torch.zeros(6, few, size)
    alone[:, :rows] = query[:, :rows]
    own = score(alone, blocks, SCALE, tile=few)
    assert torch.equal(own.found.top[:, :rows], many.found.top[:, :rows])
    found, same = own.sum(), many.sum()
    assert torch.equal(found.mass[:, :rows], same.mass[:, :rows])
    assert torch.equal(found.out[:, :rows], same.out[:, :rows])


def test_other_types_than_float32_always_come_in_tiles() -> None:
    for dtype in (torch.bfloat16, torch.float64):
        query = randn(1, 4, 16, dtype=dtype)
        assert few_rows(2, query, 64) == full_rows(2, query, 64)
