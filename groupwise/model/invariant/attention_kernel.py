"""The one attention of a batch-invariant model: training, prefill and decode launch it with tables of their own.

A tile is up to `BLOCK_ROWS // repeat` neighbouring tokens and one key head, with all query heads of that key head as
rows. It walks through its prefix's keys in blocks of 64 counted from the prefix's start, then through its own
segment's in blocks of 64 counted from that one's start, by the streaming softmax (Milakov & Gimelshein 2018, "Online
normalizer calculation for softmax", algorithm 3). A block in which a row sees nothing leaves the row's maximum as it
is, multiplies its sums by exactly 1 and adds exact zeros. So a row's bits depend on its own keys alone: neither on the
tile's other rows nor on where keys lie.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

from groupwise.model.exact.blocks import BLOCK
from groupwise.model.invariant.launching import aligned, launch, power_of_two

BLOCK_ROWS = 32
TILE_COLUMNS = 6  # of a table, see `Tiles`


@triton.jit
def add_segment(
    query,
    out,
    top,
    mass,
    key_ptr,
    value_ptr,
    distance,
    length,
    base,
    by_token,
    scale: tl.constexpr,
    start,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    """Walk through the keys `start … length - 1` of one segment. A row sees the keys that are at most `distance` (if
    CAUSAL) and less than WINDOW tokens behind it; `distance [R]` counts from the segment's first key to the row."""
    column = tl.arange(0, BLOCK_SIZE)
    for first in range(start, length, BLOCK_KEYS):
        token = first + tl.arange(0, BLOCK_KEYS)
        at = (base + token.to(tl.int64) * by_token)[:, None] * SIZE + column[None, :]
        there = (token < length)[:, None] & (column < SIZE)[None, :]
        key = tl.load(key_ptr + at, mask=there, other=0.0)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        seen = (token < length)[None, :]
        if CAUSAL:
            seen = seen & (token[None, :] <= distance[:, None])
        if WINDOW > 0:
            seen = seen & (distance[:, None] - token[None, :] < WINDOW)
        scores = tl.where(seen, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1))  # finite, as the first top is
        weights = tl.exp(scores - new_top[:, None])
        keep = tl.exp(top - new_top)
        mass = mass * keep + tl.sum(weights, axis=1)
        value = tl.load(value_ptr + at, mask=there, other=0.0)
        out = tl.dot(weights.to(value.dtype), value, out * keep[:, None], input_precision="ieee")
        top = new_top
    return out, top, mass


@triton.jit(do_not_specialize=["prefix_by_token", "prefix_by_head", "own_by_token", "own_by_head"])
def attention_kernel(
    query_ptr, prefix_key_ptr, prefix_value_ptr, own_key_ptr, own_value_ptr, tiles_ptr, out_ptr, log_mass_ptr,
    prefix_by_token, prefix_by_head, own_by_token, own_by_head,
    scale: tl.constexpr, HEADS: tl.constexpr, REPEAT: tl.constexpr, WINDOW: tl.constexpr,
    SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Program (tile, key head). Queries and results `[N, HEADS * REPEAT, SIZE]`; strides and bases count heads of SIZE
    numbers, which tells the compiler that they are multiples of it."""
    tile_ptr = tiles_ptr + tl.program_id(0) * COLUMNS
    head = tl.program_id(1)
    token = tl.load(tile_ptr)
    count = tl.load(tile_ptr + 1)
    prefix_base = tl.load(tile_ptr + 2) + head * prefix_by_head
    prefix_length = tl.load(tile_ptr + 3).to(tl.int32)
    own_base = tl.load(tile_ptr + 4) + head * own_by_head
    own_first = tl.load(tile_ptr + 5).to(tl.int32)
    own_length = own_first + count.to(tl.int32)

    row = tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_SIZE)
    place = row // REPEAT
    exists = place < count
    line = (token + place) * (HEADS * REPEAT) + head * REPEAT + row % REPEAT
    at = line[:, None] * SIZE + column[None, :]
    mask = exists[:, None] & (column < SIZE)[None, :]
    query = tl.load(query_ptr + at, mask=mask, other=0.0)
    distance = own_first + place  # from the own segment's first key

    # What lies before the window of a tile's first row is seen by none of its rows, and would change nothing.
    prefix_start = 0
    own_start = 0
    if WINDOW > 0:
        reach = own_first - WINDOW + 1
        own_start = tl.maximum(reach, 0) // BLOCK_KEYS * BLOCK_KEYS
        prefix_start = tl.maximum(reach + prefix_length, 0) // BLOCK_KEYS * BLOCK_KEYS
    out = tl.zeros((BLOCK_ROWS, BLOCK_SIZE), dtype=tl.float32)
    top = tl.full((BLOCK_ROWS,), -1e30, dtype=tl.float32)
    mass = tl.zeros((BLOCK_ROWS,), dtype=tl.float32)
    out, top, mass = add_segment(
        query, out, top, mass, prefix_key_ptr, prefix_value_ptr, distance + prefix_length, prefix_length,
        prefix_base, prefix_by_token, scale, prefix_start, False, WINDOW, SIZE, BLOCK_SIZE, BLOCK_KEYS,
    )  # fmt: skip
    out, top, mass = add_segment(
        query, out, top, mass, own_key_ptr, own_value_ptr, distance, own_length,
        own_base, own_by_token, scale, own_start, True, WINDOW, SIZE, BLOCK_SIZE, BLOCK_KEYS,
    )  # fmt: skip
    mass = tl.where(exists, mass, 1.0)
    tl.store(out_ptr + at, (out / mass[:, None]).to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(log_mass_ptr + line, top + tl.log(mass), mask=exists)


@dataclass(frozen=True, slots=True)
class KeySource:
    """Keys and values of one layer somewhere in memory, head `h` of token `t` at `base + t * by_token + h * by_head`,
    counted in heads of d numbers; `base` is a tile's."""

    key: Tensor
    value: Tensor
    by_token: int
    by_head: int


@dataclass(frozen=True, slots=True)
class Tiles:
    """What to compute.

    Attributes:
        table: `[T, 6]` int64: first token in the queries, number of tokens (at most `BLOCK_ROWS // repeat`), base and
            length of the prefix's keys, base of the own segment's keys, place of the first token in the own segment.
        prefix, own: where the keys lie.
    """

    table: Tensor
    prefix: KeySource
    own: KeySource


@dataclass(frozen=True, slots=True)
class Attended:
    """`out [N, Hq, d]` in the queries' type, `log_mass [N, Hq]` float32; tokens of no tile are 0 in both."""

    out: Tensor
    log_mass: Tensor


def constants_of(heads: int, repeat: int, size: int, *, scale: float, window: int | None) -> dict[str, Any]:
    """The kernel's compile-time arguments."""
    return {
        "scale": scale,
        "HEADS": heads,
        "REPEAT": repeat,
        "WINDOW": window or 0,
        "SIZE": size,
        "BLOCK_SIZE": power_of_two(max(size, 16)),
        "BLOCK_ROWS": BLOCK_ROWS,
        "BLOCK_KEYS": BLOCK,
        "COLUMNS": TILE_COLUMNS,
    }


def options_of(dtype: torch.dtype, size: int) -> dict[str, int]:
    """Warps and pipeline stages."""
    if dtype == torch.float32:
        return {"num_warps": 8, "num_stages": 1}
    return {"num_warps": 4, "num_stages": 3 if size <= 128 else 2}


def attend(query: Tensor, tiles: Tiles, *, heads: int, scale: float, window: int | None) -> Attended:
    """Attention of `query [N, Hq, d]` over `heads` key heads."""
    query = aligned(query)
    count, query_heads, size = query.shape
    out = torch.zeros_like(query)
    log_mass = torch.zeros(count, query_heads, dtype=torch.float32, device=query.device)
    assert query_heads // heads <= BLOCK_ROWS, "a token's rows fill more than a tile"
    launch(
        attention_kernel,
        (tiles.table.shape[0], heads),
        query,
        tiles.prefix.key,
        tiles.prefix.value,
        tiles.own.key,
        tiles.own.value,
        tiles.table,
        out,
        log_mass,
        prefix_by_token=tiles.prefix.by_token,
        prefix_by_head=tiles.prefix.by_head,
        own_by_token=tiles.own.by_token,
        own_by_head=tiles.own.by_head,
        **constants_of(heads, query_heads // heads, size, scale=scale, window=window),
        **options_of(query.dtype, size),
    )
    return Attended(out, log_mass)
