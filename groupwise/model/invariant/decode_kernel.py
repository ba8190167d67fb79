"""The attention of a decode step: `attention_kernel` cut in two where a sample's prefix ends.

All samples of a prompt walk through its keys together, as the rows of one tile, and each goes on by itself from what
was found there. A row meets the same keys in the same order, by the same operations on tiles of the same size, so its
bits are those of the one kernel; the sums between the two are float32 in memory as in registers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

from groupwise.model.invariant.attention_kernel import BLOCK_ROWS, KeySource, add_segment, constants_of, options_of
from groupwise.model.invariant.launching import aligned, launch, power_of_two


@triton.jit(do_not_specialize=["by_head"])
def store_kernel(
    key_ptr, value_ptr, key_out_ptr, value_out_ptr, position_ptr, by_head,
    key_by_token: tl.constexpr, value_by_token: tl.constexpr, HEADS: tl.constexpr, BLOCK_HEADS: tl.constexpr,
    SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """A lane's new key and value into its place in the cache; program (lane)."""
    lane = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, BLOCK_HEADS)
    column = tl.arange(0, BLOCK_SIZE)
    mask = (head < HEADS)[:, None] & (column < SIZE)[None, :]
    place = (lane * HEADS + head) * by_head + tl.load(position_ptr + lane)
    at = place[:, None] * SIZE + column[None, :]
    source = head[:, None] * SIZE + column[None, :]
    tl.store(key_out_ptr + at, tl.load(key_ptr + lane * key_by_token + source, mask=mask), mask=mask)
    tl.store(value_out_ptr + at, tl.load(value_ptr + lane * value_by_token + source, mask=mask), mask=mask)


@triton.jit
def _state_of(out_ptr, top_ptr, mass_ptr, line, at, mask, exists):
    out = tl.load(out_ptr + at, mask=mask, other=0.0)
    top = tl.load(top_ptr + line, mask=exists, other=-1e30)
    mass = tl.load(mass_ptr + line, mask=exists, other=0.0)
    return out, top, mass


@triton.jit(do_not_specialize=["by_token", "by_head", "members"])
def prefix_kernel(
    query_ptr, key_ptr, value_ptr, prompts_ptr, lanes_ptr, position_ptr, out_ptr, top_ptr, mass_ptr,
    by_token, by_head, members,
    scale: tl.constexpr, HEADS: tl.constexpr, REPEAT: tl.constexpr, WINDOW: tl.constexpr,
    SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    """The first half of `attention_kernel` for one token of each of a prompt's samples: its prefix's keys. Program
    (prompt, key head, tile of its samples). What it has found by then goes to memory."""
    prompt = tl.program_id(0)
    head = tl.program_id(1)
    base = tl.load(prompts_ptr + prompt * 2) + head * by_head
    length = tl.load(prompts_ptr + prompt * 2 + 1).to(tl.int32)
    row = tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_SIZE)
    member = tl.program_id(2) * (BLOCK_ROWS // REPEAT) + row // REPEAT
    lane = tl.load(lanes_ptr + prompt * members + member, mask=member < members, other=-1)
    exists = (lane >= 0) & (row < BLOCK_ROWS // REPEAT * REPEAT)
    line = lane * (HEADS * REPEAT) + head * REPEAT + row % REPEAT
    at = line[:, None] * SIZE + column[None, :]
    mask = exists[:, None] & (column < SIZE)[None, :]
    query = tl.load(query_ptr + at, mask=mask, other=0.0)
    distance = tl.load(position_ptr + lane, mask=exists, other=0).to(tl.int32) + length
    out = tl.zeros((BLOCK_ROWS, BLOCK_SIZE), dtype=tl.float32)
    top = tl.full((BLOCK_ROWS,), -1e30, dtype=tl.float32)
    mass = tl.zeros((BLOCK_ROWS,), dtype=tl.float32)
    out, top, mass = add_segment(
        query, out, top, mass, key_ptr, value_ptr, distance, length, base, by_token, scale, 0, False, WINDOW,
        SIZE, BLOCK_SIZE, BLOCK_KEYS,
    )  # fmt: skip
    tl.store(out_ptr + at, out, mask=mask)
    tl.store(top_ptr + line, top, mask=exists)
    tl.store(mass_ptr + line, mass, mask=exists)


@triton.jit(do_not_specialize=["by_token", "by_head"])
def own_kernel(
    query_ptr, key_ptr, value_ptr, has_prompt_ptr, position_ptr, state_ptr, top_ptr, mass_ptr, out_ptr,
    by_token, by_head,
    scale: tl.constexpr, HEADS: tl.constexpr, REPEAT: tl.constexpr, WINDOW: tl.constexpr,
    SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    """The second half: a sample's own keys, from where `prefix_kernel` left off. Program (lane, key head)."""
    lane = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    position = tl.load(position_ptr + lane).to(tl.int32)
    row = tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_SIZE)
    exists = row < REPEAT
    line = lane * (HEADS * REPEAT) + head * REPEAT + row
    at = line[:, None] * SIZE + column[None, :]
    mask = exists[:, None] & (column < SIZE)[None, :]
    query = tl.load(query_ptr + at, mask=mask, other=0.0)
    known = row < tl.where(tl.load(has_prompt_ptr + lane) != 0, REPEAT, 0)
    out, top, mass = _state_of(state_ptr, top_ptr, mass_ptr, line, at, mask & known[:, None], known)
    start = 0
    if WINDOW > 0:
        start = tl.maximum(position - WINDOW + 1, 0) // BLOCK_KEYS * BLOCK_KEYS
    distance = tl.zeros((BLOCK_ROWS,), dtype=tl.int32) + position
    out, top, mass = add_segment(
        query, out, top, mass, key_ptr, value_ptr, distance, position + 1, lane * by_head * HEADS + head * by_head,
        by_token, scale, start, True, WINDOW, SIZE, BLOCK_SIZE, BLOCK_KEYS,
    )  # fmt: skip
    mass = tl.where(exists, mass, 1.0)
    tl.store(out_ptr + at, (out / mass[:, None]).to(out_ptr.dtype.element_ty), mask=mask)


@dataclass(frozen=True, slots=True)
class DecodeTable:
    """Who sees which prompt, all int64.

    Attributes:
        prompts: `[P, 2]`, the base of each prompt's keys, as in `KeySource`, and their number.
        lanes: `[P, W]`, the lanes of its samples, -1 where there is none.
        has_prompt: `[B]`, 0 for padding, which sees its own key alone.
        position: `[B]`, the place of each lane's new token among its own.
    """

    prompts: Tensor
    lanes: Tensor
    has_prompt: Tensor
    position: Tensor


def store_keys(key: Tensor, value: Tensor, own: KeySource, position: Tensor) -> None:
    """Put `key, value [B, Hkv, d]`, of which a token's heads lie side by side, at the lanes' `position [B]`."""
    key, value = (x if x.stride(1) == x.shape[2] and x.stride(2) == 1 else aligned(x) for x in (key, value))
    lanes, heads, size = key.shape
    launch(
        store_kernel, (lanes,), key, value, own.key, own.value, position, by_head=own.by_head,
        key_by_token=key.stride(0), value_by_token=value.stride(0), HEADS=heads, BLOCK_HEADS=power_of_two(heads),
        SIZE=size, BLOCK_SIZE=power_of_two(size), num_warps=4,
    )  # fmt: skip


def attend_step(
    query: Tensor, table: DecodeTable, prefix: KeySource, own: KeySource, *, heads: int, scale: float,
    window: int | None,
) -> Tensor:  # fmt: skip
    """`[B, Hq, d]`, each lane's new token's attention over its prompt and its own keys, `query [B, Hq, d]`."""
    query = aligned(query)
    lanes, query_heads, size = query.shape
    repeat = query_heads // heads
    state = torch.empty(query.shape, dtype=torch.float32, device=query.device)
    top, mass = (torch.empty(lanes, query_heads, dtype=torch.float32, device=query.device) for _ in range(2))
    out = torch.empty_like(query)
    constants = constants_of(heads, repeat, size, scale=scale, window=window)
    del constants["COLUMNS"]
    options = options_of(query.dtype, size)
    prompts, members = table.lanes.shape
    launch(
        prefix_kernel, (prompts, heads, triton.cdiv(members, BLOCK_ROWS // repeat)), query, prefix.key, prefix.value,
        table.prompts, table.lanes, table.position, state, top, mass, by_token=prefix.by_token,
        by_head=prefix.by_head, members=members, **constants, **options,
    )  # fmt: skip
    launch(
        own_kernel, (lanes, heads), query, own.key, own.value, table.has_prompt, table.position, state, top, mass, out,
        by_token=own.by_token, by_head=own.by_head, **constants, **options,
    )  # fmt: skip
    return out
