"""Sums of rows in a fixed order: those behind a log-normaliser."""

from __future__ import annotations

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

from groupwise.model.invariant.launching import aligned, launch, power_of_two

SUM_BLOCK = 4096


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


def sum_rows(x: Tensor) -> Tensor:
    """`x.sum(-1)` of `[M, V]` float32."""
    rows = aligned(x)
    out = rows.new_empty(rows.shape[0])
    block = min(SUM_BLOCK, power_of_two(rows.shape[1]))
    warps = 8 if block > 512 else 1
    launch(sum_kernel, (rows.shape[0],), rows, out, SIZE=rows.shape[1], BLOCK=block, num_warps=warps)
    return out
