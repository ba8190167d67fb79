"""silu(gate) * up (SwiGLU; Shazeer 2020, "GLU variants", equation 6), forward and backward."""

from __future__ import annotations

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

from groupwise.model.invariant.launching import aligned, launch

_BLOCK = 1024


@triton.jit
def gate_kernel(gate_ptr, up_ptr, out_ptr, by_row: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """`out [N, SIZE]`; rows of `gate` and `up` are `by_row` numbers apart. Program (row, block of columns)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < SIZE
    gate = tl.load(gate_ptr + row * by_row + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * by_row + column, mask=mask, other=0.0).to(tl.float32)
    kind = out_ptr.dtype.element_ty
    opened = (gate / (1.0 + tl.exp(-gate))).to(kind).to(tl.float32)
    tl.store(out_ptr + row * SIZE + column, (opened * up).to(kind), mask=mask)


@triton.jit
def gate_backward_kernel(
    gate_ptr, up_ptr, grad_ptr, of_gate_ptr, of_up_ptr, by_row: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < SIZE
    gate = tl.load(gate_ptr + row * by_row + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * by_row + column, mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + row * SIZE + column, mask=mask, other=0.0).to(tl.float32)
    share = 1.0 / (1.0 + tl.exp(-gate))
    kind = of_up_ptr.dtype.element_ty
    tl.store(of_up_ptr + row * SIZE + column, (grad * gate * share).to(kind), mask=mask)
    of_gate = grad * up * share * (1.0 + gate * (1.0 - share))
    tl.store(of_gate_ptr + row * SIZE + column, of_gate.to(kind), mask=mask)


def _rows(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, int]:
    """`[N, I]` each, and how far apart rows are, the same for both: they may be halves of one tensor."""
    gate, up = (x.reshape(-1, x.shape[-1]) for x in (gate, up))
    strides = gate.stride(), up.stride()
    if strides[0] != strides[1] or strides[0][1] != 1 or any(x.data_ptr() % 16 for x in (gate, up)):
        gate, up = aligned(gate), aligned(up)
    return gate, up, gate.stride(0)


def gated_rows(gate: Tensor, up: Tensor) -> Tensor:
    """`[…, I]`, contiguous."""
    rows, others, by_row = _rows(gate, up)
    count, size = rows.shape
    out = gate.new_empty(gate.shape)
    blocks = triton.cdiv(size, _BLOCK)
    launch(gate_kernel, (count, blocks), rows, others, out, by_row=by_row, SIZE=size, BLOCK=_BLOCK, num_warps=4)
    return out


def gate_gradients(gate: Tensor, up: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Of gate and up, `[…, I]` each."""
    rows, others, by_row = _rows(gate, up)
    count, size = rows.shape
    founds = torch.empty(2, *gate.shape, dtype=gate.dtype, device=gate.device)
    blocks = triton.cdiv(size, _BLOCK)
    launch(
        gate_backward_kernel, (count, blocks), rows, others, aligned(grad), founds[0], founds[1], by_row=by_row,
        SIZE=size, BLOCK=_BLOCK, num_warps=4,
    )  # fmt: skip
    return founds[0], founds[1]
