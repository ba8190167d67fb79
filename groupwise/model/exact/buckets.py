"""Segments of a packed sequence laid side by side, in whole blocks, so that attention computes many of them at once.

Neighbours of one length are already a rectangle in the packed sequence: they are read and written where they lie. Where
lengths differ, short segments are gathered by index.

Shapes: n segments, padded to T tokens, of a packed sequence of N; `x [N, H * repeat, …]` has one head per query head,
or with `repeat` 1 per key head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

import torch
from torch import Tensor

from groupwise.model.exact.blocks import padded_keys
from groupwise.model.forward.packing import Segment

_MAX_SCORES = 1 << 26  # float32 scores of one bucket that exist at one time: 256 MiB
_RUN_TOKENS = 512  # from here on neighbours of one length are a bucket of their own


class Bucket(Protocol):
    """Segments that are computed together. Forward passes see them padded to T, backward passes to R rows."""

    def gather(self, x: Tensor, repeat: int) -> Tensor:
        """`[N, H * repeat, d]` as `[H * n, T * repeat, d]`, one key head's rows together; padding is finite."""
        ...

    def scatter(self, x: Tensor, repeat: int, into: Tensor) -> None:
        """The inverse: `[H * n, T * repeat, …]` to the bucket's places in `[N, H * repeat, …]`."""
        ...

    def pick(self, x: Tensor, *, lost: float | None = None) -> Tensor:
        """The bucket's rows of `[N, …]` as `[n, R, …]`; where there is no row, `lost`, or anything if that is None."""
        ...

    def put(self, rows: Tensor, into: Tensor) -> None:
        """`[n, R, …]`, those that exist, to their places in `[N, …]`."""
        ...

    def to(self, device: torch.device) -> Bucket: ...


@dataclass(frozen=True, slots=True)
class Run:
    """`count` neighbours of one `length`, the first of which begins at `start`."""

    start: int
    count: int
    length: int

    def gather(self, x: Tensor, repeat: int) -> Tensor:
        heads, padded = x.shape[1] // repeat, padded_keys(self.length)
        rows = x.new_empty(heads, self.count, padded, repeat, *x.shape[2:])
        rows[:, :, self.length :].zero_()
        rows[:, :, : self.length].copy_(self._by_head(x, heads))
        return rows.view(heads * self.count, padded * repeat, *x.shape[2:])

    def scatter(self, x: Tensor, repeat: int, into: Tensor) -> None:
        heads = into.shape[1] // repeat
        rows = x.view(heads, self.count, -1, repeat, *x.shape[2:])
        self._by_head(into, heads).copy_(rows[:, :, : self.length])

    def _by_head(self, x: Tensor, heads: int) -> Tensor:
        """`[heads, n, length, repeat, …]`, a view of `x`."""
        return self.pick(x).unflatten(2, (heads, -1)).movedim(2, 0)

    def pick(self, x: Tensor, *, lost: float | None = None) -> Tensor:
        return x[self.start : self.start + self.count * self.length].unflatten(0, (self.count, self.length))

    def put(self, rows: Tensor, into: Tensor) -> None:
        self.pick(into).copy_(rows)

    def to(self, device: torch.device) -> Run:
        return self


@dataclass(frozen=True, slots=True)
class Pool:
    """Segments anywhere, each of at most T tokens.

    Attributes:
        index: `[n, T]`, packed positions; where there is no row, the segment's first.
        flat: `[V]`, those of the rows that exist; `real`: `[V]`, their places in the flattened `[n * T]`.
        lost: `[n, T]`, true where there is no row.
    """

    index: Tensor
    flat: Tensor
    real: Tensor
    lost: Tensor

    @staticmethod
    def of(segments: Sequence[Segment], length: int) -> Pool:
        offset = torch.arange(length)
        start = torch.tensor([s.start for s in segments])[:, None]
        exists = offset[None] < torch.tensor([s.length for s in segments])[:, None]
        index = torch.where(exists, start + offset, start)
        real = exists.flatten().nonzero().flatten()
        return Pool(index, index.flatten()[real], real, ~exists)

    def gather(self, x: Tensor, repeat: int) -> Tensor:
        heads = x.unflatten(1, (-1, repeat)).transpose(0, 1)[:, self.index.flatten()]
        return heads.reshape(heads.shape[0] * self.index.shape[0], -1, *x.shape[2:])

    def scatter(self, x: Tensor, repeat: int, into: Tensor) -> None:
        n, length = self.index.shape
        heads = x.view(-1, n * length, repeat, *x.shape[2:]).transpose(0, 1)
        self.put(heads.reshape(n, length, *into.shape[1:]), into)

    def pick(self, x: Tensor, *, lost: float | None = None) -> Tensor:
        # Whole rows are copied quicker than by indexing.
        rows = x.index_select(0, self.index.flatten()).unflatten(0, self.index.shape)
        return rows if lost is None else rows.masked_fill_(self.lost[(..., *[None] * (x.dim() - 1))], lost)

    def put(self, rows: Tensor, into: Tensor) -> None:
        into.index_copy_(0, self.flat, rows.flatten(0, 1).index_select(0, self.real).to(into.dtype))

    def to(self, device: torch.device) -> Pool:
        return Pool(*(x.to(device) for x in (self.index, self.flat, self.real, self.lost)))


def make_buckets(segments: Sequence[Segment], num_heads: int) -> tuple[Bucket, ...]:
    """Every segment in one bucket.

    Args:
        num_heads: query heads, for sizing the work.
    """
    buckets: list[Bucket] = []
    pooled: dict[int, list[Segment]] = {}
    for length, group in groupby(segments, lambda segment: segment.length):
        run = list(group)
        if len(run) * length < _RUN_TOKENS:
            pooled.setdefault(padded_keys(length), []).extend(run)
            continue
        buckets += [Run(part[0].start, len(part), length) for part in _parts(run, padded_keys(length), num_heads)]
    for padded, some in sorted(pooled.items()):
        buckets += [Pool.of(part, padded) for part in _parts(some, padded, num_heads)]
    return tuple(buckets)


def _parts(segments: list[Segment], padded: int, num_heads: int) -> list[list[Segment]]:
    """As many together as memory allows."""
    most = max(1, _MAX_SCORES // (num_heads * padded * padded))
    return [segments[first : first + most] for first in range(0, len(segments), most)]
