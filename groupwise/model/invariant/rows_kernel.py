"""Reductions along rows in a fixed order: RMS norms, and the sums behind a log-normaliser."""

from __future__ import annotations

from typing import Any

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

from groupwise.model.invariant.launching import aligned, launch, power_of_two

SUM_BLOCK = 4096


@triton.jit(do_not_specialize=["M"])
def norm_kernel(
    x_ptr,
    weight_ptr,
    out_ptr,
    M,
    epsilon: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
):
    """RMS norms of `x [M, SIZE]` (Zhang & Sennrich 2019, equation 4), rounded where transformers' modules round.

    UNIT_OFFSET: Gemma's, by 1 + weight, all in float32; else Llama's, whose normalised rows are rounded first.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    at = row.to(tl.int64)[:, None] * SIZE + column[None, :]
    mask = (row[:, None] < M) & (column[None, :] < SIZE)
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=1) / SIZE + epsilon)
    weight = tl.load(weight_ptr + column, mask=column < SIZE, other=0.0).to(tl.float32)[None, :]
    unit = x * scale[:, None]
    if UNIT_OFFSET:
        out = unit * (1.0 + weight)
    else:
        out = weight * unit.to(out_ptr.dtype.element_ty).to(tl.float32)
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def sum_kernel(x_ptr, out_ptr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """`out [M]`, the sums of the rows of `x [M, SIZE]` float32: one program a row, block after block from its start."""
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    row_ptr = x_ptr + row.to(tl.int64) * SIZE
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, SIZE, BLOCK):
        total += tl.load(row_ptr + start + column, mask=column < SIZE - start, other=0.0)
    tl.store(out_ptr + row, tl.sum(total, axis=0))


def norm_constants(size: int, epsilon: float, *, unit_offset: bool) -> dict[str, Any]:
    """The norm kernel's compile-time arguments; short rows, as those of heads, share a program."""
    block = power_of_two(size)
    rows = max(1, min(16, 2048 // block))
    return {"epsilon": epsilon, "SIZE": size, "BLOCK": block, "ROWS": rows, "UNIT_OFFSET": unit_offset}


def norm_rows(x: Tensor, weight: Tensor, epsilon: float, *, unit_offset: bool) -> Tensor:
    """The norm of `x […, H]` by `weight [H]`, in the type of `x`."""
    size = x.shape[-1]
    rows = aligned(x.reshape(-1, size))
    out = rows.new_empty(rows.shape)
    constants = norm_constants(size, epsilon, unit_offset=unit_offset)
    programs = (triton.cdiv(rows.shape[0], constants["ROWS"]),)
    launch(norm_kernel, programs, rows, aligned(weight), out, M=rows.shape[0], **constants, num_warps=4)
    return out.view(x.shape)


def sum_rows(x: Tensor) -> Tensor:
    """`x.sum(-1)` of `[M, V]` float32."""
    rows = aligned(x)
    out = rows.new_empty(rows.shape[0])
    block = min(SUM_BLOCK, power_of_two(rows.shape[1]))
    warps = 8 if block > 512 else 1
    launch(sum_kernel, (rows.shape[0],), rows, out, SIZE=rows.shape[1], BLOCK=block, num_warps=warps)
    return out
