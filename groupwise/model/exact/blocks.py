"""Attention whose bits do not depend on how it is batched: the arithmetic that sampler and trainer share.

A row of queries meets its keys in blocks, counted from the start of each key segment; where they begin is a function
of the place alone (`block_starts`). Scores, their exponentials and the sums over one block always have the same shape,
and blocks are added in order; a block in which a row sees nothing adds exact zeros. So the result of a row depends
neither on the number of other rows nor on how far keys are padded. A query that sees two segments (its prompt, then its
own completion) takes its exponentials from the maximum of both, and adds the sums.

Blocks have `BLOCK` keys up to `FINE`, and `LARGEST` from there on: a long answer then has a quarter of the products,
and all that is not a product costs by the block. They cannot be larger: of 448 or more keys, the product with the
values takes two sums, which part where the number of keys says (measured, float32).

A block's last keys may be left out where no row sees them, down to one of `widths`: scores, sums and products then
keep their bits. Decoding, which waits for memory, reads no more of a half-filled block. Which widths these are is found
by trying, since kernels differ with processors: on AMD's (Zen 5), the product with the values of more than 128 keys is
cut in two equal parts, so that 192 keys have other sums than 256.

Row counts given to matrix products are multiples of `TILE`: fewer rows take other kernels with another order of sums.
Where a processor's products are found to give fewer the same bits, decoding pads none (`few_rows`).

A hidden score is pushed far down, floored and its weight set to zero, in three cheap passes: on a CPU the exponential
of a number that underflows costs 13 times that of a plain one. (`exp2` would not, but its last elements are computed
otherwise than the rest, so its bits depend on the place.)

Shapes: B independent heads, R query rows, d head size, W keys of a block. All sums are float32 (float64 in a float64
model).
The softmax is the safe one of Milakov & Gimelshein 2018, "Online normalizer calculation for softmax", algorithm 2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

BLOCK = 64
FINE = 256  # keys, from which on blocks are larger
LARGEST = 256
NARROWEST = 16
TILE = 4
_SMALL_PRODUCT = 16**3
_FAR = -1e30
_FLOOR = -87.0  # of exponents; exp is still a normal float32


def block_of(token: int) -> int:
    """Which block of its segment a token is in."""
    return token // BLOCK if token < FINE else FINE // BLOCK + (token - FINE) // LARGEST


def block_start(index: int) -> int:
    """The first token of a block."""
    larger = max(0, index - FINE // BLOCK)
    return min(index * BLOCK, FINE) + larger * LARGEST


@lru_cache
def block_starts(tokens: int) -> tuple[int, ...]:
    """Where the blocks begin that hold a segment of `tokens`."""
    return tuple(map(block_start, range(block_of(tokens - 1) + 1))) if tokens > 0 else ()


def block_spans(tokens: int) -> list[tuple[int, int]]:
    """The same with where they end, the last one with the segment."""
    starts = block_starts(tokens)
    return list(zip(starts, (*starts[1:], tokens), strict=False))  # no tokens, no block


@dataclass(frozen=True, slots=True)
class Mask:
    """`bias`: 0 where a key is seen, far down where not; `keep`: 1 and 0. Both `[1, r, C]` for a block's first r
    rows (all later rows see every key), or `[B or 1, 1, C]` for all rows; C are its last keys, from `first_key` on."""

    bias: Tensor
    keep: Tensor
    first_key: int = 0

    @staticmethod
    def of(hidden: Tensor, dtype: torch.dtype, first_key: int = 0) -> Mask:
        """The mask that is True where a key is hidden, for a model that computes in `dtype`."""
        sums = hidden.to(torch.promote_types(dtype, torch.float32))
        return Mask(sums * _FAR, 1 - sums, first_key)

    def part_of(self, x: Tensor) -> Tensor:
        """What of `x [B, R, W]` the mask concerns."""
        rows = x if self.bias.shape[1] == 1 else x[:, : self.bias.shape[1]]
        return rows[..., self.first_key :] if self.first_key else rows


@dataclass(frozen=True, slots=True)
class KeyBlock:
    """One block of keys and what its rows may not see.

    Attributes:
        key, value: `[B, W, d]`, W as `width_of` gives it.
        first_row: rows before it see nothing of this block, and are not computed; 0 in a segment's first block.
        mask: which keys are hidden; None when all rows see all keys.
    """

    key: Tensor
    value: Tensor
    first_row: int = 0
    mask: Mask | None = None


@lru_cache
def widths() -> tuple[int, ...]:
    """Those at which a block may be read, where its keys behind are seen by nobody, by trying on this processor."""
    narrow = [width for width in (NARROWEST, 32) if _keeps_bits(width, BLOCK)]
    wide = [width for width in range(2 * BLOCK, LARGEST, BLOCK) if _keeps_bits(width, LARGEST)]
    return (*narrow, BLOCK, *wide, LARGEST)


def _keeps_bits(width: int, whole: int) -> bool:
    """Whether values of `width` keys, weighed and added, have the bits of `whole` keys with zeros for the rest: for few
    rows and many, in both types. Another order of sums shows in a third of all numbers, and here are thousands."""
    draw = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        for dtype in (torch.float32, torch.bfloat16):
            for batch, size in ((2, 16), (33, 48), (2, 64), (9, 128)):
                weights = torch.randn(batch, 16 * TILE, whole, generator=draw).to(dtype)
                value = torch.randn(batch, whole, size, generator=draw).to(dtype)
                weights[..., width:] = 0
                wanted = wide_bmm(weights, value)
                for rows in (full_rows(TILE, value, batch), weights.shape[1]):
                    some = wide_bmm(weights[:, :rows, :width].contiguous(), value[:, :width])
                    if not torch.equal(some, wanted[:, :rows]):
                        return False
    return True


def width_of(keys: int) -> int:
    """The least width at which a block that holds `keys` keys is read."""
    return next(width for width in widths() if keys <= width)


def padded_keys(tokens: int) -> int:
    """`tokens` of a segment with what fills its last block, to a multiple of `BLOCK` at which blocks may end."""
    start = block_start(block_of(tokens - 1)) if tokens > 0 else 0
    return start + max(width_of(tokens - start), BLOCK) if tokens > 0 else 0


def full_rows(rows: int, query: Tensor, batch: int) -> int:
    """As many query rows as `rows` need: full tiles, and on a CPU enough for the kernel that larger products take.

    In bfloat16 a batch of products with 16^3 multiplications or fewer leaves oneDNN's kernel for one with another
    order of sums (measured: 1 in 50,000 sums differs).

    Args:
        query: of the dtype, device and head size `[…, d]`.
        batch: products side by side.
    """
    least = 0
    if query.device.type == "cpu" and query.dtype not in (torch.float32, torch.float64):
        least = _SMALL_PRODUCT // (batch * NARROWEST * query.shape[-1]) + 1
    return -(-max(rows, least) // TILE) * TILE


def few_rows(rows: int, query: Tensor, batch: int) -> int:
    """As `full_rows`, but in float32 on a CPU no more than `rows` where its products are found to give so few rows the
    bits that they have in company. A decode step then neither multiplies nor weighs padding.

    The keys must lie as a cache holds them, `[…, d, W]` transposed.
    """
    if query.device.type == "cpu" and query.dtype == torch.float32 and _alike(rows, query.shape[-1]):
        return rows
    return full_rows(rows, query, batch)


@lru_cache
def _alike(rows: int, size: int) -> bool:
    """Whether both products of `rows` queries have the bits of full tiles, by trying: kernels differ with processors.
    Another order of sums shows in a third of all numbers, and here are thousands."""
    draw = torch.Generator().manual_seed(0)
    company = 16 * TILE
    with torch.inference_mode():
        for batch in (1, 2, 33):
            query, weights, key, value = (
                torch.randn(batch, *shape, generator=draw)
                for shape in ((company, size), (company, LARGEST), (size, LARGEST), (LARGEST, size))
            )
            for width in widths():
                for left, right in ((query, key[..., :width]), (weights[..., :width], value[:, :width])):
                    few = torch.bmm(left[:, :rows].contiguous(), right)
                    if not torch.equal(few, torch.bmm(left.contiguous(), right)[:, :rows]):
                        return False
    return True


def wide(x: Tensor) -> Tensor:
    """`x` in the type that sums are kept in: float32, or float64 when the model computes in it."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


@lru_cache
def widens(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a batched product of `dtype` can leave its sums in float32: a GPU's can, and that of a CPU which has none
    for `dtype` of its own, and so multiplies in float32."""
    if dtype in (torch.float32, torch.float64):
        return False
    if device.type == "cpu":
        return not _multiplies(dtype)
    probe = torch.ones(1, 16, 16, dtype=dtype, device=device)
    try:
        torch.bmm(probe, probe, out_dtype=torch.float32)
    except (RuntimeError, TypeError):  # no kernel, or an older torch
        return False
    return True


@lru_cache
def _multiplies(dtype: torch.dtype) -> bool:
    """Whether oneDNN has products of `dtype` for this processor. Without (AVX2), torch takes a loop whose sums depend
    on how keys lie in memory, and which is some 16 times slower than a product in float32 (measured)."""
    if dtype != torch.bfloat16:
        return True
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def wide_bmm(a: Tensor, b: Tensor, *, out: Tensor | None = None) -> Tensor:
    """`torch.bmm` in the type that sums are kept in, with no rounding on the way where the device can spare it."""
    if out is not None and out.dtype == a.dtype:
        return torch.bmm(a, b, out=out)
    if not widens(a.dtype, a.device):
        found = wide(torch.bmm(a, b))
    elif a.device.type == "cpu":
        found = torch.bmm(a.float(), b.float())
    else:
        found = torch.bmm(a, b, out_dtype=torch.float32)
    return found if out is None else out.copy_(found)


def split_scale(dtype: torch.dtype, scale: float) -> tuple[float, float]:
    """The factor on the scores as one on the queries, where that costs no precision, and one that is left for the
    scores; a power of two costs none in any type."""
    costly = dtype not in (torch.float32, torch.float64) and math.frexp(scale)[0] != 0.5
    return (1.0, scale) if costly else (scale, 1.0)


def _rows_from(x: Tensor, first: int) -> Tensor:
    """The rows of `x [B, R, …]` from `first` on. To be added to in place: `x[…] += y` copies the rows once more."""
    return x[:, first:] if first else x


def _scores(query: Tensor, block: KeyBlock, scale: float) -> Tensor:
    """`[B, R - first_row, W]`, far down where hidden."""
    scores = wide_bmm(_rows_from(query, block.first_row), block.key.transpose(1, 2))
    if scale != 1.0:
        scores.mul_(scale)
    if block.mask is not None:
        block.mask.part_of(scores).add_(block.mask.bias)
    return scores


def _weigh(scores: Tensor, top: Tensor, block: KeyBlock) -> Tensor:
    """exp(scores - top), in place; exactly 0 where hidden. `top [B, R - first_row]`."""
    scores.sub_(top[..., None])
    if block.mask is None:
        return scores.exp_()
    concerned = block.mask.part_of(scores)
    concerned.clamp_(min=_FLOOR)
    scores.exp_()
    concerned.mul_(block.mask.keep)
    return scores


@dataclass(frozen=True, slots=True)
class Found:
    """What B x R query rows find in one key segment: each row's maximum `top [B, R]`, the sum of its weights `mass [B,
    R]`, and values added by weight, undivided, `out [B, R, d]`."""

    top: Tensor
    mass: Tensor
    out: Tensor

    @staticmethod
    def empty(query: Tensor) -> Found:
        """Memory for `query [B, R, d]`, to be written."""
        sums = torch.promote_types(query.dtype, torch.float32)
        top, mass = (query.new_empty(query.shape[:2], dtype=sums) for _ in range(2))
        return Found(top, mass, query.new_empty(query.shape, dtype=sums))


@dataclass(frozen=True, slots=True)
class Scores:
    """Query rows that have met one key segment: `scores [B, R - first_row, W]` by block, and `found.top`, which may be
    written over."""

    blocks: Sequence[KeyBlock]
    scores: list[Tensor]
    found: Found
    dtype: torch.dtype

    def sum(self, top: Tensor | None = None) -> Found:
        """Fill mass and out, weighed by exp(score - `top`), the rows' own maximum or a larger one, `[B, R]`. The scores
        are used up."""
        top = self.found.top if top is None else top
        mass, out = self.found.mass, self.found.out
        for block, scores in zip(self.blocks, self.scores, strict=True):
            _weigh(scores, _rows_from(top, block.first_row), block)
        torch.sum(self.scores[0], -1, out=mass)
        wide_bmm(self.scores[0].to(self.dtype), self.blocks[0].value, out=out)
        for block, weights in zip(self.blocks[1:], self.scores[1:], strict=True):
            _rows_from(mass, block.first_row).add_(weights.sum(-1))
            _rows_from(out, block.first_row).add_(wide_bmm(weights.to(self.dtype), block.value))
        return self.found


def score(
    query: Tensor, blocks: Sequence[KeyBlock], scale: float, into: Found | None = None, *, tile: int = TILE
) -> Scores:
    """`query [B, R, d]` meets one key segment, R a multiple of `TILE`.

    Args:
        into: where results go, instead of fresh memory.
        tile: R, where `few_rows` gave it.
    """
    assert query.shape[1] % tile == 0, f"{query.shape[1]} query rows are not a multiple of {tile}"
    assert blocks[0].first_row == 0, "every row sees the first block of a segment"
    factor, left = split_scale(query.dtype, scale)
    asking = query if factor == 1.0 else query * factor
    scores = [_scores(asking, block, left) for block in blocks]
    found = Found.empty(query) if into is None else into
    torch.amax(scores[0], -1, out=found.top)
    for block, some in zip(blocks[1:], scores[1:], strict=True):
        rows = _rows_from(found.top, block.first_row)
        torch.maximum(rows, some.amax(-1), out=rows)
    return Scores(blocks, scores, found, query.dtype)


def causal_blocks(key: Tensor, value: Tensor, repeat: int, window: int | None, first: int = 0) -> list[KeyBlock]:
    """Blocks of a segment that sees itself, as its rows from token `first` on meet them.

    Args:
        key, value: `[B, T, d]`, T as `padded_keys` gives it; row r is token `first + r // repeat`.
    """
    length = key.shape[1]
    assert length % BLOCK == 0, f"{length} keys are not a multiple of {BLOCK}"
    blocks: list[KeyBlock] = []
    for start, stop in block_spans(length):
        own = max(start, first)  # the first token whose rows are computed
        mask = None
        if window is not None:
            token = torch.arange(start, stop, device=key.device)
            row = torch.arange(own, length, device=key.device).repeat_interleave(repeat)[:, None]
            mask = Mask.of(((row < token) | (row - token >= window))[None], key.dtype)
        elif own < stop:
            bias, keep = _triangle(stop - own, repeat, key.dtype, key.device)
            mask = Mask(bias, keep, own - start)
        blocks.append(KeyBlock(key[:, start:stop], value[:, start:stop], (own - first) * repeat, mask))
    return blocks


@lru_cache(32)
def _triangle(tokens: int, repeat: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Bias and keep `[1, tokens * repeat, tokens]` of rows that see the keys up to their own token."""
    with torch.inference_mode(False):  # a tensor made in that mode serves no gradient
        token = torch.arange(tokens, device=device)
        mask = Mask.of((token > token.repeat_interleave(repeat)[:, None])[None], dtype)
        return mask.bias, mask.keep


def prefix_blocks(
    key: Tensor, value: Tensor, length: int, distance: Tensor | None, window: int | None
) -> list[KeyBlock]:
    """Blocks of a prefix that every row sees: `[B, T, d]`, T the `padded_keys` of `length`.

    Args:
        distance: `[R]`, each row's position minus the prefix's first; needed with a sliding window only.
    """
    token = torch.arange(key.shape[1], device=key.device)
    blocks: list[KeyBlock] = []
    for start, stop in block_spans(key.shape[1]):
        key_token = token[start:stop]
        hidden, first_key = None, 0
        if stop > length:
            first_key = (length - start) // BLOCK * BLOCK
            hidden = (key_token[first_key:] >= length)[None, None]
        if window is not None:
            assert distance is not None, "a sliding window needs the rows' positions"
            hidden = ((distance[:, None] - key_token >= window) | (key_token >= length))[None]
            first_key = 0
        mask = None if hidden is None else Mask.of(hidden, key.dtype, first_key)
        blocks.append(KeyBlock(key[:, start:stop], value[:, start:stop], 0, mask))
    return blocks
