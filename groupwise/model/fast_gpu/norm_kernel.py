"""RMS norms (Zhang & Sennrich 2019, equation 4) with the residual's sum before them, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

from groupwise.model.invariant.launching import aligned, launch, power_of_two

_PROGRAMS = 512
"""Of a backward pass: each adds up the weight's gradient over rows of its own."""


@triton.jit(do_not_specialize=["M"])
def add_norm_kernel(
    fresh_ptr,
    residual_ptr,
    weight_ptr,
    sum_ptr,
    out_ptr,
    M,
    epsilon: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    ADDS: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
):
    """`sum = residual + fresh` (if ADDS), `out` its norm, rounded where transformers' modules round; all `[M, SIZE]`.

    UNIT_OFFSET: Gemma's, by 1 + weight, all in float32; else Llama's, whose normalised rows are rounded first.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    at = row.to(tl.int64)[:, None] * SIZE + column[None, :]
    mask = (row[:, None] < M) & (column[None, :] < SIZE)
    x = tl.load(fresh_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if ADDS:
        x = tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32) + x
        rounded = x.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + at, rounded, mask=mask)
        x = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=1) / SIZE + epsilon)
    weight = tl.load(weight_ptr + column, mask=column < SIZE, other=0.0).to(tl.float32)[None, :]
    unit = x * scale[:, None]
    if UNIT_OFFSET:
        out = unit * (1.0 + weight)
    else:
        out = weight * unit.to(out_ptr.dtype.element_ty).to(tl.float32)
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M"])
def norm_backward_kernel(
    x_ptr,
    weight_ptr,
    grad_ptr,
    more_ptr,
    of_x_ptr,
    of_weight_ptr,
    M,
    epsilon: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    ADDS: tl.constexpr,
):
    """`of_x [M, SIZE]` from the norm's gradient, and (if ADDS) `more`, that of the sum itself; `of_weight [programs,
    SIZE]`, each program's part."""
    column = tl.arange(0, BLOCK)
    weight = tl.load(weight_ptr + column, mask=column < SIZE, other=0.0).to(tl.float32)[None, :]
    total = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for first in range(tl.program_id(0) * ROWS, M, tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS)
        at = row.to(tl.int64)[:, None] * SIZE + column[None, :]
        mask = (row[:, None] < M) & (column[None, :] < SIZE)
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(x * x, axis=1) / SIZE + epsilon)[:, None]
        unit = x * scale
        total += grad * unit
        along = grad * weight
        # What the mean square takes back: the gradient's part along x.
        of_x = (along - unit * (tl.sum(along * unit, axis=1) / SIZE)[:, None]) * scale
        if ADDS:
            of_x += tl.load(more_ptr + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(of_x_ptr + at, of_x.to(of_x_ptr.dtype.element_ty), mask=mask)
    tl.store(of_weight_ptr + tl.program_id(0) * SIZE + column, tl.sum(total, axis=0), mask=column < SIZE)


def norm_sizes(size: int) -> dict[str, Any]:
    """Compile-time sizes for rows of `size`; short rows share a program."""
    block = power_of_two(size)
    return {"SIZE": size, "BLOCK": block, "ROWS": max(1, min(16, 2048 // block))}


def backward_warps(dtype: torch.dtype) -> int:
    """Of a backward program: float32 rows need the registers of eight."""
    return 8 if dtype == torch.float32 else 4


def add_norm_rows(
    fresh: Tensor, residual: Tensor | None, weight: Tensor, epsilon: float, *, unit_offset: bool = False
) -> tuple[Tensor, Tensor]:
    """The sum of `fresh […, H]` and the residual, or `fresh` where there is none; and its norm by `weight [H]`.

    Args:
        unit_offset: by 1 + weight, as Gemma's.
    """
    size = fresh.shape[-1]
    fresh = aligned(fresh)
    rows, constants = fresh.numel() // size, norm_sizes(size)
    out = torch.empty_like(fresh)
    whole = fresh if residual is None else torch.empty_like(fresh)
    launch(
        add_norm_kernel, (triton.cdiv(rows, constants["ROWS"]),), fresh,
        fresh if residual is None else aligned(residual), aligned(weight), whole, out,
        M=rows, epsilon=epsilon, ADDS=residual is not None, UNIT_OFFSET=unit_offset, **constants, num_warps=4,
    )  # fmt: skip
    return whole, out


def norm_gradients(
    x: Tensor, weight: Tensor, grad: Tensor, more: Tensor | None, epsilon: float
) -> tuple[Tensor, Tensor]:
    """Of `x […, H]` and of the weight, from the norm's `grad`, and from `more`, another gradient of `x`."""
    size = x.shape[-1]
    x, grad = aligned(x), aligned(grad)
    rows, constants = x.numel() // size, norm_sizes(size)
    programs = max(1, min(_PROGRAMS, triton.cdiv(rows, constants["ROWS"])))
    of_x = torch.empty_like(x)
    of_weight = torch.empty(programs, size, dtype=torch.float32, device=x.device)
    launch(
        norm_backward_kernel, (programs,), x, aligned(weight), grad, grad if more is None else aligned(more), of_x,
        of_weight, M=rows, epsilon=epsilon, ADDS=more is not None, **constants, num_warps=backward_warps(x.dtype),
    )  # fmt: skip
    return of_x, of_weight.sum(0).to(weight.dtype)
