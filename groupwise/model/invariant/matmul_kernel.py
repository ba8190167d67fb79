"""The one matrix product of a batch-invariant model.

Each program computes one tile of the result, and walks through K from its start to its end: no split of K, and one
instruction for every number of rows. Sums are float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

from groupwise.model.invariant.launching import aligned, launch, power_of_two


@triton.jit(do_not_specialize=["M"])
def product_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    M,
    N: tl.constexpr,
    K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """`out [M, N]` = `x [M, K]` `weight [N, K]`^T + `bias [N]`, all contiguous."""
    # Programs that run together share rows and columns: GROUP tiles of rows beside each other.
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    number = tl.program_id(0)
    first_m = number // (GROUP * tiles_n) * GROUP
    high = tl.minimum(tiles_m - first_m, GROUP)
    inside = number % (GROUP * tiles_n)
    tile_m = first_m + inside % high
    tile_n = inside // high

    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # Rows and columns beyond the end read the last one, and are not stored.
    x_at = x_ptr + tl.minimum(m, M - 1).to(tl.int64)[:, None] * K + k[None, :]
    weight_at = weight_ptr + tl.minimum(n, N - 1).to(tl.int64)[None, :] * K + k[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        if K % BLOCK_K == 0:
            x = tl.load(x_at + start)
            weight = tl.load(weight_at + start)
        else:
            x = tl.load(x_at + start, mask=(k < K - start)[None, :], other=0.0)
            weight = tl.load(weight_at + start, mask=(k < K - start)[:, None], other=0.0)
        total = tl.dot(x, weight, total, input_precision="ieee")
    if HAS_BIAS:
        total += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    out_at = out_ptr + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(out_at, total.to(out_ptr.dtype.element_ty), mask=(m[:, None] < M) & (n[None, :] < N))


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a product with one shape of weight is cut; nothing of it depends on the number of rows."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int

    @staticmethod
    def of(n: int, k: int, dtype: torch.dtype) -> Tiling:
        """For a weight `[n, k]`. Narrow ones are cut finer, so that a decode step's few rows keep all of a GPU busy."""
        wide = 128 if n > 4096 else 64
        if dtype == torch.float32:  # no tensor cores: whole rows of a tile lie in registers
            return Tiling(64, min(64, power_of_two(max(n, 16))), min(16, power_of_two(max(k, 16))), 4, 2)
        return Tiling(64, min(wide, power_of_two(max(n, 16))), min(64, power_of_two(max(k, 16))), 4, 4)

    def constants(self, n: int, k: int, *, has_bias: bool) -> dict[str, Any]:
        """The kernel's compile-time arguments."""
        blocks = {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "BLOCK_K": self.block_k, "GROUP": 8}
        return {"N": n, "K": k, "HAS_BIAS": has_bias, **blocks}


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`[…, N]` = `x […, K]` `weight [N, K]`^T + `bias [N]`, in the type of `x`."""
    n, k = weight.shape
    rows = aligned(x.reshape(-1, k))
    out = x.new_empty(*x.shape[:-1], n)  # no view: autograd lets nobody write over one of a function of our own
    tiling = Tiling.of(n, k, x.dtype)
    tiles = triton.cdiv(rows.shape[0], tiling.block_m) * triton.cdiv(n, tiling.block_n)
    weight = aligned(weight)
    launch(
        product_kernel,
        (tiles,),
        rows,
        weight,
        weight if bias is None else aligned(bias),
        out,
        M=rows.shape[0],
        **tiling.constants(n, k, has_bias=bias is not None),
        num_warps=tiling.warps,
        num_stages=tiling.stages,
    )
    return out
