"""Keys and values of prompts and samples. A cache has lanes: one per prompt, or one per sample.

Two forms hold the same content. `BlockCache` (CPU) grows by blocks of tokens, and the block-wise order of sums that
makes attention exact reads them where they lie. `ArenaCache` (GPU) is one tensor that keeps its address, as CUDA graphs
need.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from groupwise.model.exact import BLOCK, width_of

ARENA_SPAN = 256  # keys of a GPU step come in multiples of this, so that few graphs serve all lengths

_GENERATIONS = itertools.count()


@dataclass(frozen=True, slots=True)
class CacheShape:
    """Layers, key heads, head size and dtype of a model's keys and values."""

    layers: int
    heads: int
    size: int
    dtype: torch.dtype
    device: torch.device

    @property
    def bytes_per_token(self) -> int:
        return 2 * self.layers * self.heads * self.size * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of keys from token `start` on: `key, value [lanes * heads, tokens, size]`, views of the cache."""

    start: int
    key: Tensor
    value: Tensor


class Write(Protocol):
    """Where the lanes of one step put their new token; found once and used by every layer."""

    def put(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Store `[lanes, heads, size]` each."""
        ...


class KeyCache(Protocol):
    """What scheduler and decode layout need of a cache."""

    shape: CacheShape
    lanes: int

    @property
    def tokens(self) -> int:
        """Room in every lane."""
        ...

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` in every lane. Fresh room is zero: hidden keys must be finite."""
        ...

    def widen(self, lanes: int) -> None:
        """More lanes; what the old ones hold stays."""
        ...

    def fill(self, layer: int, lane: int, key: Tensor, value: Tensor) -> None:
        """Store a whole prompt: `[P, heads, size]` each."""
        ...

    def move(self, source: int, target: int, tokens: int) -> None:
        """Copy one lane's first `tokens` over another's."""
        ...

    def spans(self, layer: int, lanes: int, tokens: int) -> list[Span]:
        """The first `lanes` lanes' first `tokens` keys, or a few more."""
        ...

    def plan_write(self, position: Tensor, tokens: Sequence[int]) -> Write:
        """A write of lane i's token `position[i]`; `tokens` is the same on the host."""
        ...


class BlockCache:
    """`blocks[b]`: `[2, layers, lanes, heads, BLOCK, size]`, keys and values of tokens `b * BLOCK …`.

    Every block of the first n lanes is one contiguous tensor.
    """

    def __init__(self, shape: CacheShape, lanes: int = 0) -> None:
        self.shape = shape
        self.lanes = lanes
        self.blocks: list[Tensor] = []

    @property
    def tokens(self) -> int:
        return len(self.blocks) * BLOCK

    def reserve(self, tokens: int) -> None:
        shape = self.shape
        while len(self.blocks) * BLOCK < tokens:
            size = (2, shape.layers, self.lanes, shape.heads, BLOCK, shape.size)
            self.blocks.append(torch.zeros(size, dtype=shape.dtype, device=shape.device))

    def widen(self, lanes: int) -> None:
        for index, block in enumerate(self.blocks):
            self.blocks[index] = pad(block, (0, 0, 0, 0, 0, 0, 0, lanes - self.lanes))
        self.lanes = lanes

    def fill(self, layer: int, lane: int, key: Tensor, value: Tensor) -> None:
        for which, x in enumerate((key, value)):
            for index, part in enumerate(x.transpose(0, 1).split(BLOCK, dim=1)):
                self.blocks[index][which, layer, lane, :, : part.shape[1]] = part

    def move(self, source: int, target: int, tokens: int) -> None:
        for block in self.blocks[: -(-tokens // BLOCK)]:
            block[:, :, target] = block[:, :, source]

    def spans(self, layer: int, lanes: int, tokens: int) -> list[Span]:
        spans: list[Span] = []
        for index, block in enumerate(self.blocks[: -(-tokens // BLOCK)]):
            width = width_of(tokens - index * BLOCK)
            key, value = (block[which, layer, :lanes].flatten(0, 1)[:, :width] for which in (0, 1))
            spans.append(Span(index * BLOCK, key, value))
        return spans

    def plan_write(self, position: Tensor, tokens: Sequence[int]) -> Write:
        return _BlockWrite(self, position, tokens)


class _BlockWrite:
    """One plain slice when all lanes stand at one token, as they do when they started together; else one per block."""

    def __init__(self, cache: BlockCache, position: Tensor, tokens: Sequence[int]) -> None:
        self._cache = cache
        self._targets: list[_Target]
        if len(set(tokens)) == 1:
            self._targets = [_Target(tokens[0] // BLOCK, slice(0, len(tokens)), tokens[0] % BLOCK)]
            return
        block = position // BLOCK
        self._targets = [
            _Target(index, lanes, position[lanes] % BLOCK)
            for index in sorted({token // BLOCK for token in tokens})
            for lanes in [(block == index).nonzero().flatten()]
        ]

    def put(self, layer: int, key: Tensor, value: Tensor) -> None:
        for target in self._targets:
            block = self._cache.blocks[target.block]
            block[0, layer, target.lanes, :, target.offset] = key[target.lanes]
            block[1, layer, target.lanes, :, target.offset] = value[target.lanes]


@dataclass(frozen=True, slots=True)
class _Target:
    block: int
    lanes: Tensor | slice
    offset: Tensor | int


class ArenaCache:
    """`arena`: `[2, layers, lanes, heads, tokens, size]`. No two arenas, of any cache, have one `generation`: graphs of
    old ones are void."""

    def __init__(self, shape: CacheShape, lanes: int = 0) -> None:
        self.shape = shape
        self.lanes = lanes
        self.generation = next(_GENERATIONS)
        self.arena = self._empty(lanes, 0)

    @property
    def tokens(self) -> int:
        return self.arena.shape[4]

    def _empty(self, lanes: int, tokens: int) -> Tensor:
        shape = self.shape
        size = (2, shape.layers, lanes, shape.heads, tokens, shape.size)
        return torch.zeros(size, dtype=shape.dtype, device=shape.device)

    def _replace(self, lanes: int, tokens: int) -> None:
        old, self.arena = self.arena, self._empty(lanes, tokens)
        self.arena[:, :, : old.shape[2], :, : old.shape[4]] = old
        self.lanes = lanes
        self.generation = next(_GENERATIONS)

    def reserve(self, tokens: int) -> None:
        if tokens > self.arena.shape[4]:
            self._replace(self.lanes, -(-tokens // ARENA_SPAN) * ARENA_SPAN)

    def widen(self, lanes: int) -> None:
        self._replace(lanes, self.arena.shape[4])

    def fill(self, layer: int, lane: int, key: Tensor, value: Tensor) -> None:
        self.arena[0, layer, lane, :, : key.shape[0]] = key.transpose(0, 1)
        self.arena[1, layer, lane, :, : value.shape[0]] = value.transpose(0, 1)

    def move(self, source: int, target: int, tokens: int) -> None:
        self.arena[:, :, target, :, :tokens] = self.arena[:, :, source, :, :tokens]

    def spans(self, layer: int, lanes: int, tokens: int) -> list[Span]:
        length = min(-(-tokens // ARENA_SPAN) * ARENA_SPAN, self.arena.shape[4])
        key, value = (self.arena[which, layer, :lanes].flatten(0, 1)[:, :length] for which in (0, 1))
        return [Span(0, key, value)]

    def plan_write(self, position: Tensor, tokens: Sequence[int]) -> Write:
        return _ArenaWrite(self, position)


class _ArenaWrite:
    """One indexed write for all lanes, without asking the GPU for anything."""

    def __init__(self, cache: ArenaCache, position: Tensor) -> None:
        self._cache = cache
        self._position = position
        self._lanes = torch.arange(position.shape[0], device=position.device)

    def put(self, layer: int, key: Tensor, value: Tensor) -> None:
        for which, x in enumerate((key, value)):
            self._cache.arena[which, layer].transpose(1, 2)[self._lanes, self._position] = x


def make_cache(shape: CacheShape) -> KeyCache:
    """An empty cache of the form that suits the device."""
    return ArenaCache(shape) if shape.device.type == "cuda" else BlockCache(shape)
