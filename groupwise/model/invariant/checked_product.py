"""The library's matrix product, where it was found to give each row the same bits in any company; else the kernel's.

cuBLASLt has many kernels for one product, and chooses by the number of rows. Each walks through K from start to end,
so they agree, but for those that split K (measured on an H100: six of eight shapes agreed with these allowed, all of
eight without, from 16 to 16,384 rows). No manual promises that. So it is looked at, once for each shape of weight:
numbers of rows are rounded up to a few, and each of them must give the bits of the largest. A shape for which one
does not is computed by the kernel in `matmul_kernel`, which agrees by construction, and is slower.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from groupwise.model.forward.packing import ROW_MULTIPLE, round_up

logger = logging.getLogger(__name__)

_ALIGNMENT = 256
"""Bytes; kernels are chosen by the addresses, too, and torch tells up to this."""
_FEW, MOST_ROWS = 512, 16_384
"""Rows: up to the first they are multiples of 16, up to the second multiples of 256; more are cut."""
_COARSE = 256


def row_counts() -> list[int]:
    """All numbers of rows that a product is asked for."""
    return [*range(ROW_MULTIPLE, _FEW, ROW_MULTIPLE), *range(_FEW, MOST_ROWS + 1, _COARSE)]


def padded_count(rows: int) -> int:
    """The least of `row_counts` that is no less than `rows`; beyond the greatest, a multiple of 256."""
    return round_up(rows, ROW_MULTIPLE if rows <= _FEW - ROW_MULTIPLE else _COARSE)


def forbid_split_sums() -> None:
    """From now on, products of this process take no kernel that splits K, and come from the library that can be told.

    Sums in reduced precision are forbidden, too.
    """
    torch.backends.cuda.preferred_blas_library("cublaslt")
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = (False, False)


Product: TypeAlias = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""`[…, N]` = `x […, K]` `weight [N, K]`^T + `bias [N]`, each row with the same bits in any company."""


def kernel_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A `Product`, by the kernel."""
    from groupwise.model.invariant.matmul_kernel import product

    return product(x, weight, bias)


def library_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A `Product`, where `library_serves`; `x` has one of `row_counts` rows, as `padded_rows` gives them."""
    return linear(x, weight, bias)


def padded_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, int]:
    """`x [M, K]`, M at most `MOST_ROWS`, with zero rows behind it as far as the library needs them; and M."""
    count = x.shape[0]
    wanted = padded_count(count)
    if wanted < _FEW:
        wanted = _quick_counts(*weight.shape, bias is not None, weight.device)[wanted]
    missing = wanted - count
    rows = pad(x, (0, 0, 0, missing)) if missing else x.contiguous()
    return (rows.clone() if rows.data_ptr() % _ALIGNMENT else rows), count


def library_serves(weight: Tensor, bias: Tensor | None) -> bool:
    """Whether `library_product` is one for this weight."""
    if weight.dtype != torch.bfloat16 or weight.device.type != "cuda" or weight.data_ptr() % _ALIGNMENT:
        return False
    if not weight.is_contiguous() or (bias is not None and bias.data_ptr() % _ALIGNMENT):
        return False
    agree = rows_agree(*weight.shape, bias is not None, weight.device)
    if agree:
        _quick_counts(*weight.shape, bias is not None, weight.device)
    return agree


@cache
@torch.no_grad()
def rows_agree(n: int, k: int, has_bias: bool, device: torch.device) -> bool:
    """Whether the library gives every number of rows the bits of the largest, for a weight `[n, k]` in bfloat16.

    It asks the device, so it must not happen first while a graph is captured.
    """
    assert not torch.cuda.is_current_stream_capturing(), "a product was not looked at before its capture"
    generator = torch.Generator(device).manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, generator=generator).to(torch.bfloat16)

    x, weight = numbers(MOST_ROWS, k), numbers(n, k)
    bias = numbers(n) if has_bias else None
    whole = linear(x, weight, bias)
    unequal = torch.stack([(linear(x[:m], weight, bias) != whole[:m]).any() for m in row_counts()])
    found = not bool(unequal.any())
    if not found:
        worst = [m for m, bad in zip(row_counts(), unequal.tolist(), strict=True) if bad]
        logger.info(
            "products with a weight of %d x %d are computed by the slower kernel: the library's differ at %s rows",
            n,
            k,
            ", ".join(map(str, worst[:5])),
        )
    return found


@cache
@torch.no_grad()
def _quick_counts(n: int, k: int, has_bias: bool, device: torch.device) -> dict[int, int]:
    """For each small number of rows the number to compute instead, which takes less time by a third, or itself: what
    the library is left with can be ten times as slow (an H100, 1,024 x 3,072: 72 us at 64 rows, 7 at 96).

    All of them have the same bits, so it does not matter if another is found the next time.
    """
    weight = torch.zeros(n, k, device=device, dtype=torch.bfloat16)
    bias = torch.zeros(n, device=device, dtype=torch.bfloat16) if has_bias else None
    x = torch.zeros(_FEW, k, device=device, dtype=torch.bfloat16)
    counts = [count for count in row_counts() if count <= _FEW]
    taken = {count: min(_milliseconds(x[:count], weight, bias) for _ in range(3)) for count in counts}
    quick: dict[int, int] = {}
    for count in counts:
        best = min((other for other in counts if other >= count), key=taken.__getitem__)
        quick[count] = best if taken[best] < taken[count] / 1.5 else count
    return quick


def _milliseconds(x: Tensor, weight: Tensor, bias: Tensor | None) -> float:
    """Of one product, among others that keep the device busy while the host asks for it."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(8):
        linear(x, weight, bias)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 8
