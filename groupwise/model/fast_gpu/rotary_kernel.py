"""Norms of heads and rotations by their tokens' angles (Su et al. 2021, "RoFormer", equation 34) in one pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

from groupwise.model.invariant.launching import aligned, launch, power_of_two

_ROWS = 16  # heads of a program; tokens come in multiples of it, so none has heads of queries and of keys
_PROGRAMS = 1024


@triton.jit
def _rotated_rows(
    x_ptr, weight_ptr, cos_ptr, turned_ptr, out_ptr, first, count,
    by_token, epsilon: tl.constexpr, HEADS: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, NORMS: tl.constexpr,
):  # fmt: skip
    row = first + tl.arange(0, ROWS)
    token = row // HEADS
    head = row % HEADS
    column = tl.arange(0, BLOCK)
    inside = column < SIZE
    mask = (row[:, None] < count) & inside[None, :]
    other = (column + SIZE // 2) % SIZE
    base = token.to(tl.int64) * by_token + head * SIZE
    x = tl.load(x_ptr + base[:, None] + column[None, :], mask=mask, other=0.0)
    beside = tl.load(x_ptr + base[:, None] + other[None, :], mask=mask, other=0.0)
    kind = out_ptr.dtype.element_ty
    if NORMS:
        full = x.to(tl.float32)
        scale = tl.rsqrt(tl.sum(full * full, axis=1) / SIZE + epsilon)[:, None]
        weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)[None, :]
        weight_beside = tl.load(weight_ptr + other, mask=inside, other=0.0).to(tl.float32)[None, :]
        x = (weight * (full * scale).to(kind).to(tl.float32)).to(kind)
        beside = (weight_beside * (beside.to(tl.float32) * scale).to(kind).to(tl.float32)).to(kind)
    angle = token.to(tl.int64)[:, None] * SIZE + column[None, :]
    cos = tl.load(cos_ptr + angle, mask=mask, other=0.0).to(tl.float32)
    turned = tl.load(turned_ptr + angle, mask=mask, other=0.0).to(tl.float32)
    straight = (x.to(tl.float32) * cos).to(kind).to(tl.float32)
    across = (beside.to(tl.float32) * turned).to(kind).to(tl.float32)
    at = row.to(tl.int64)[:, None] * SIZE + column[None, :]
    tl.store(out_ptr + at, (straight + across).to(kind), mask=mask)


@triton.jit(do_not_specialize=["N"])
def rotary_kernel(
    query_ptr, key_ptr, query_weight_ptr, key_weight_ptr, cos_ptr, turned_ptr, query_out_ptr, key_out_ptr,
    N, query_by_token: tl.constexpr, key_by_token: tl.constexpr, epsilon: tl.constexpr, QUERY_HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, NORMS: tl.constexpr,
):  # fmt: skip
    """`[N, heads, SIZE]` queries and keys, normed and turned; programs of queries first."""
    of_queries = tl.cdiv(N * QUERY_HEADS, ROWS)
    number = tl.program_id(0)
    if number < of_queries:
        _rotated_rows(
            query_ptr, query_weight_ptr, cos_ptr, turned_ptr, query_out_ptr, number * ROWS, N * QUERY_HEADS,
            query_by_token, epsilon, QUERY_HEADS, SIZE, BLOCK, ROWS, NORMS,
        )  # fmt: skip
    else:
        _rotated_rows(
            key_ptr, key_weight_ptr, cos_ptr, turned_ptr, key_out_ptr, (number - of_queries) * ROWS, N * KEY_HEADS,
            key_by_token, epsilon, KEY_HEADS, SIZE, BLOCK, ROWS, NORMS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["N"])
def rotary_backward_kernel(
    x_ptr, weight_ptr, cos_ptr, turned_ptr, grad_ptr, of_x_ptr, of_weight_ptr,
    N, by_token: tl.constexpr, epsilon: tl.constexpr, HEADS: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, NORMS: tl.constexpr,
):  # fmt: skip
    """`of_x [N, HEADS, SIZE]`, and each program's part of the weight's gradient, `of_weight [programs, SIZE]`."""
    column = tl.arange(0, BLOCK)
    inside = column < SIZE
    other = (column + SIZE // 2) % SIZE
    count = N * HEADS
    total = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    weight = tl.load(weight_ptr + column, mask=inside & NORMS, other=0.0).to(tl.float32)[None, :]
    for first in range(tl.program_id(0) * ROWS, count, tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS)
        token = row // HEADS
        mask = (row[:, None] < count) & inside[None, :]
        at = row.to(tl.int64)[:, None] * SIZE
        angle = token.to(tl.int64)[:, None] * SIZE + column[None, :]
        cos = tl.load(cos_ptr + angle, mask=mask, other=0.0).to(tl.float32)
        turned = tl.load(turned_ptr + angle, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + at + column[None, :], mask=mask, other=0.0).to(tl.float32)
        beside = tl.load(grad_ptr + at + other[None, :], mask=mask, other=0.0).to(tl.float32)
        # The inverse rotation: both halves have the same angles, so those of the other half are the negated ones.
        grad = grad * cos - beside * turned
        if NORMS:
            base = token.to(tl.int64) * by_token + (row % HEADS) * SIZE
            x = tl.load(x_ptr + base[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)
            scale = tl.rsqrt(tl.sum(x * x, axis=1) / SIZE + epsilon)[:, None]
            unit = x * scale
            total += grad * unit
            along = grad * weight
            grad = (along - unit * (tl.sum(along * unit, axis=1) / SIZE)[:, None]) * scale
        tl.store(of_x_ptr + at + column[None, :], grad.to(of_x_ptr.dtype.element_ty), mask=mask)
    if NORMS:
        tl.store(of_weight_ptr + tl.program_id(0) * SIZE + column, tl.sum(total, axis=0), mask=inside)


@dataclass(frozen=True, slots=True)
class Angles:
    """`cos, turned [N, d]`: cosines, and sines with those of the first half negated."""

    cos: Tensor
    turned: Tensor


def _constants(size: int) -> dict[str, Any]:
    return {"SIZE": size, "BLOCK": power_of_two(size), "ROWS": _ROWS, "num_warps": 4}


def _by_token(x: Tensor) -> tuple[Tensor, int]:
    """`x [N, heads, d]` with heads one after the other, and the distance of two tokens in numbers."""
    if x.stride(2) != 1 or x.stride(1) != x.shape[2] or x.data_ptr() % 16 or x.stride(0) * x.itemsize % 16:
        x = aligned(x)
    return x, x.stride(0)


def rotated(
    query: Tensor, key: Tensor, norms: tuple[Tensor, Tensor] | None, angles: Angles, epsilon: float
) -> tuple[Tensor, Tensor]:
    """`query [N, Hq, d]` and `key [N, Hkv, d]`, parts of one tensor or not, normed by `norms [d]` each, and turned."""
    query, query_by_token = _by_token(query)
    key, key_by_token = _by_token(key)
    count, heads, size = query.shape
    outs = query.new_empty(query.shape), key.new_empty(key.shape)
    weights = (angles.cos, angles.cos) if norms is None else tuple(map(aligned, norms))
    programs = triton.cdiv(count * heads, _ROWS) + triton.cdiv(count * key.shape[1], _ROWS)
    launch(
        rotary_kernel, (programs,), query, key, *weights, aligned(angles.cos), aligned(angles.turned), *outs, N=count,
        query_by_token=query_by_token, key_by_token=key_by_token, epsilon=epsilon, QUERY_HEADS=heads,
        KEY_HEADS=key.shape[1], NORMS=norms is not None, **_constants(size),
    )  # fmt: skip
    return outs


def rotary_gradients(
    x: Tensor, weight: Tensor | None, angles: Angles, grad: Tensor, epsilon: float
) -> tuple[Tensor, Tensor | None]:
    """Of `x [N, heads, d]` and of the norm's weight."""
    x, by_token = _by_token(x)
    grad = aligned(grad)
    count, heads, size = x.shape
    programs = max(1, min(_PROGRAMS, triton.cdiv(count * heads, _ROWS)))
    of_x = grad.new_empty(grad.shape)
    of_weight = torch.empty(programs if weight is not None else 1, size, dtype=torch.float32, device=x.device)
    launch(
        rotary_backward_kernel, (programs,), x, x if weight is None else aligned(weight), aligned(angles.cos),
        aligned(angles.turned), grad, of_x, of_weight, N=count, by_token=by_token, epsilon=epsilon, HEADS=heads,
        NORMS=weight is not None, **_constants(size),
    )  # fmt: skip
    return of_x, None if weight is None else of_weight.sum(0).to(weight.dtype)
