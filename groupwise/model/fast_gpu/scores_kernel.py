"""Rows of logits to normalisers, log-probs, gradients and tokens: one order of sums for whoever asks.

Sums over the vocabulary go block by block from its start. A row's logits are divided by its temperature as torch
divides, so that it makes no difference who does it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

from groupwise.model.invariant.launching import launch, power_of_two

_BLOCK = 4096
_WARPS = 8


@triton.jit
def _scaled(logits_ptr, temperature, at, mask, TEMPERED: tl.constexpr):
    x = tl.load(logits_ptr + at, mask=mask, other=float("-inf")).to(tl.float32)
    if TEMPERED:
        x = tl.div_rn(x, tl.zeros_like(x) + temperature)
    return x


@triton.jit
def _temperature_of(temperature_ptr, row, TEMPERED: tl.constexpr):
    """0, greedy, counts as 1."""
    temperature = 1.0
    if TEMPERED:
        temperature = tl.load(temperature_ptr + row)
        temperature = tl.where(temperature > 0.0, temperature, 1.0)
    return temperature


@triton.jit
def weigh_kernel(
    logits_ptr, temperature_ptr, top_ptr, mass_ptr, blocks_ptr, by_row: tl.constexpr,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, COUNT: tl.constexpr, TEMPERED: tl.constexpr, KEEPS: tl.constexpr,
):  # fmt: skip
    """`top [M]`, `mass [M]`, the sum of exp(logit - top); and (if KEEPS) each block's sum, `blocks [M, COUNT]`."""
    row = tl.program_id(0)
    row_ptr = logits_ptr + row.to(tl.int64) * by_row
    temperature = _temperature_of(temperature_ptr, row, TEMPERED)
    column = tl.arange(0, BLOCK)
    highest = tl.full((BLOCK,), float("-inf"), dtype=tl.float32)
    for start in range(0, SIZE, BLOCK):
        highest = tl.maximum(highest, _scaled(row_ptr, temperature, start + column, column < SIZE - start, TEMPERED))
    top = tl.max(highest, axis=0)
    mass = 0.0
    for number in range(COUNT):
        start = number * BLOCK
        some = tl.sum(
            tl.exp(_scaled(row_ptr, temperature, start + column, column < SIZE - start, TEMPERED) - top), axis=0
        )
        mass += some
        if KEEPS:
            tl.store(blocks_ptr + row.to(tl.int64) * COUNT + number, some)
    tl.store(top_ptr + row, top)
    tl.store(mass_ptr + row, mass)


@triton.jit
def logprob_kernel(
    logits_ptr, temperature_ptr, target_ptr, top_ptr, mass_ptr, out_ptr, by_row: tl.constexpr, TEMPERED: tl.constexpr
):
    """`out [M]`, the targets' log-probs. The top goes first: its digits would drown those of the mass."""
    row = tl.program_id(0)
    temperature = _temperature_of(temperature_ptr, row, TEMPERED)
    target = tl.load(target_ptr + row)
    x = tl.load(logits_ptr + row.to(tl.int64) * by_row + target).to(tl.float32)
    if TEMPERED:
        x = tl.div_rn(x, temperature)
    tl.store(out_ptr + row, x - tl.load(top_ptr + row) - tl.log(tl.load(mass_ptr + row)))


@triton.jit
def logprob_backward_kernel(
    logits_ptr, temperature_ptr, target_ptr, top_ptr, mass_ptr, grad_ptr, of_logits_ptr,
    by_row: tl.constexpr,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, TEMPERED: tl.constexpr,
):  # fmt: skip
    """A logit's gradient is (1 where it is the target) - its probability, by the temperature. Program (row, block)."""
    row = tl.program_id(0)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = at < SIZE
    temperature = _temperature_of(temperature_ptr, row, TEMPERED)
    x = _scaled(logits_ptr + row.to(tl.int64) * by_row, temperature, at, mask, TEMPERED)
    weight = tl.exp(x - tl.load(top_ptr + row)) / tl.load(mass_ptr + row)
    hit = tl.where(at == tl.load(target_ptr + row), 1.0, 0.0)
    grad = tl.load(grad_ptr + row) * (hit - weight)
    if TEMPERED:
        grad = grad / temperature
    of_row = of_logits_ptr + row.to(tl.int64) * by_row
    tl.store(of_row + at, grad.to(of_logits_ptr.dtype.element_ty), mask=mask)


@triton.jit
def pick_kernel(
    logits_ptr, temperature_ptr, uniform_ptr, top_ptr, blocks_ptr, token_ptr, by_row: tl.constexpr,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, COUNT: tl.constexpr, BLOCKS: tl.constexpr, TEMPERED: tl.constexpr,
    GREEDY: tl.constexpr,
):  # fmt: skip
    """`token [M]`: the first whose cumulative probability exceeds `uniform [M]` float64, by blocks and then within
    one; (if GREEDY) the first most likely one in the rows whose temperature is 0."""
    row = tl.program_id(0)
    row_ptr = logits_ptr + row.to(tl.int64) * by_row
    temperature = _temperature_of(temperature_ptr, row, TEMPERED)
    top = tl.load(top_ptr + row)
    column = tl.arange(0, BLOCK)
    number = tl.arange(0, BLOCKS)
    known = number < COUNT
    some = tl.load(blocks_ptr + row.to(tl.int64) * COUNT + number, mask=known, other=0.0).to(tl.float64)
    upto = tl.cumsum(some, axis=0)
    point = tl.load(uniform_ptr + row) * tl.sum(tl.where(number == COUNT - 1, upto, 0.0), axis=0)
    block = tl.minimum(tl.sum(tl.where(known & (upto <= point), 1, 0), axis=0), COUNT - 1)
    before = tl.sum(tl.where(number == block - 1, upto, 0.0), axis=0)
    at = block * BLOCK + column
    weight = tl.exp(_scaled(row_ptr, temperature, at, at < SIZE, TEMPERED) - top)
    within = tl.sum(tl.where(tl.cumsum(weight.to(tl.float64), axis=0) <= point - before, 1, 0), axis=0)
    # Rounding can put the point past the block's end; its last token with any mass is meant then.
    last = tl.max(tl.where(weight > 0.0, column, 0), axis=0)
    token = block * BLOCK + tl.minimum(within, last)
    if GREEDY:  # noqa: SIM102 - this is known when the kernel is compiled
        if tl.load(temperature_ptr + row) == 0.0:
            token = SIZE
            for start in range(0, SIZE, BLOCK):
                x = _scaled(row_ptr, 1.0, start + column, column < SIZE - start, False)
                first = tl.min(tl.where((x == top) & (column < SIZE - start), start + column, SIZE), axis=0)
                token = tl.minimum(token, first)
    tl.store(token_ptr + row, token.to(tl.int64))


@dataclass(frozen=True, slots=True)
class Normaliser:
    """Of each row of logits: `top [M]`, `mass [M]`, the sum of exponentials behind it, and that of each block."""

    top: Tensor
    mass: Tensor
    blocks: Tensor


def weigh_rows(logits: Tensor, temperature: Tensor | None, *, keeps: bool = False) -> Normaliser:
    """Normalisers of `logits [M, V]`.

    Args:
        temperature: `[M]` float32 that the logits are divided by; 0 counts as 1.
        keeps: the blocks' sums, for `pick_tokens`.
    """
    rows, size = logits.shape
    assert logits.stride(1) == 1 and not logits.data_ptr() % 16, "rows of logits lie in one piece, from their start"
    count = triton.cdiv(size, _BLOCK)
    top, mass = (torch.empty(rows, dtype=torch.float32, device=logits.device) for _ in range(2))
    blocks = torch.empty(rows, count, dtype=torch.float32, device=logits.device) if keeps else mass
    launch(
        weigh_kernel, (rows,), logits, top if temperature is None else temperature, top, mass, blocks,
        by_row=logits.stride(0), SIZE=size, BLOCK=_BLOCK, COUNT=count, TEMPERED=temperature is not None, KEEPS=keeps,
        num_warps=_WARPS,
    )  # fmt: skip
    return Normaliser(top, mass, blocks)


def logprob_rows(logits: Tensor, targets: Tensor, temperature: Tensor | None, found: Normaliser) -> Tensor:
    """`[M]` float32 log-probs of `targets [M]`."""
    out = torch.empty_like(found.top)
    launch(
        logprob_kernel, (logits.shape[0],), logits, out if temperature is None else temperature, targets, found.top,
        found.mass, out, by_row=logits.stride(0), TEMPERED=temperature is not None, num_warps=1,
    )  # fmt: skip
    return out


def logprob_gradients(
    logits: Tensor, targets: Tensor, temperature: Tensor | None, found: Normaliser, grad: Tensor, *, in_place: bool
) -> Tensor:
    """Of `logits [M, V]`, from that of the log-probs; written over them where `in_place`."""
    rows, size = logits.shape
    of_logits = logits if in_place else torch.empty_like(logits)
    grad = grad.contiguous()
    launch(
        logprob_backward_kernel, (rows, triton.cdiv(size, _BLOCK)), logits,
        grad if temperature is None else temperature, targets, found.top, found.mass, grad, of_logits,
        by_row=logits.stride(0), SIZE=size, BLOCK=_BLOCK,
        TEMPERED=temperature is not None, num_warps=_WARPS,
    )  # fmt: skip
    return of_logits


def pick_tokens(
    logits: Tensor, uniform: Tensor, temperature: Tensor | None, *, any_greedy: bool
) -> tuple[Tensor, Normaliser]:
    """`[M]` int64 tokens of `logits [M, V]`, by inversion of the cumulative distribution at `uniform [M]` float64.

    Args:
        temperature: as for `weigh_rows`; rows of 0 get the most likely token, where `any_greedy`.
    """
    rows, size = logits.shape
    found = weigh_rows(logits, temperature, keeps=True)
    count = found.blocks.shape[1]
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    launch(
        pick_kernel, (rows,), logits, found.top if temperature is None else temperature, uniform, found.top,
        found.blocks, tokens, by_row=logits.stride(0), SIZE=size, BLOCK=_BLOCK, COUNT=count,
        BLOCKS=power_of_two(max(count, 2)), TEMPERED=temperature is not None, GREEDY=any_greedy, num_warps=_WARPS,
    )  # fmt: skip
    return tokens, found
