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

from groupwise.model.exact.blocks import NARROWEST, block_of, block_spans, block_start, padded_keys, width_of
from groupwise.model.fast_cpu.host_memory import zeros_in_large_pages
from groupwise.model.forward.packing import round_up

ARENA_SPAN = 256  # tokens of an arena come in multiples of this

_GENERATIONS = itertools.count()


@dataclass(frozen=True, slots=True)
class CacheShape:
    """Layers, key heads, head size and dtype of a model's keys and values.

    Attributes:
        fixed: caches keep their address: the model's kernels, or graphs, read an arena.
        graphs: steps are CUDA graphs, which fix sizes; so their sizes are rounded up to a few.
        by_kernel: a kernel attends that reads each length where it is, so that no step's shape depends on lengths.
    """

    layers: int
    heads: int
    size: int
    dtype: torch.dtype
    device: torch.device
    fixed: bool = False
    graphs: bool = False
    by_kernel: bool = False

    @property
    def bytes_per_token(self) -> int:
        return 2 * self.layers * self.heads * self.size * self.dtype.itemsize

    def capacity(self, tokens: int) -> int:
        """Tokens that a lane for `tokens` holds."""
        return round_up(tokens, ARENA_SPAN) if self.fixed else padded_keys(tokens)

    def lanes_for(self, samples: int) -> int:
        return _few(samples, 32) if self.graphs else samples

    def prompts_for(self, prompts: int) -> int:
        return _few(prompts, 8) if self.graphs else prompts

    def tokens_for(self, tokens: int) -> int:
        """Keys of each lane that a step's shape says; in graphs, more than there are, by less than 256 or a quarter;
        nothing for the kernel."""
        if self.by_kernel:
            return 0
        if not self.graphs:
            return round_up(tokens, NARROWEST)
        return round_up(tokens, max(ARENA_SPAN, 1 << max(0, (tokens - 1).bit_length() - 3)))


def _few(n: int, unit: int) -> int:
    """A power of two, or a multiple of `unit`, itself one."""
    return 1 << (n - 1).bit_length() if n < unit else round_up(n, unit)


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of tokens from `start` on: each layer's `keys, values [lanes * heads, tokens, size]`, views of the
    cache."""

    start: int
    keys: Sequence[Tensor]
    values: Sequence[Tensor]


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

    def reserve(self, lanes: int, tokens: int) -> None:
        """Make room for `tokens` in each of `lanes`; what it holds stays. Fresh room is zero: hidden keys must be
        finite."""
        ...

    def fill(self, layer: int, lane: int, key: Tensor, value: Tensor) -> None:
        """Store a whole prompt: `[P, heads, size]` each."""
        ...

    def move(self, source: int, target: int, tokens: int) -> None:
        """Copy one lane's first `tokens` over another's."""
        ...

    def read(self, lane: int, tokens: int) -> list[Tensor]:
        """A copy of one lane's first `tokens`, for `write`."""
        ...

    def write(self, lane: int, kept: Sequence[Tensor]) -> None:
        """Put back what `read` gave."""
        ...

    def spans(self, lanes: int, tokens: int) -> list[Span]:
        """The first `lanes` lanes' first `tokens` keys, or a few more."""
        ...

    def plan_write(self, position: Tensor, tokens: Sequence[int]) -> Write:
        """A write of lane i's token `position[i]`; `tokens` is the same on the host."""
        ...


@dataclass(frozen=True, slots=True)
class Block:
    """Some tokens of all lanes, W of them from `block_start` on: `keys [layers, lanes, heads, size, W]`, `values
    [layers, lanes, heads, W, size]`. A block grows up to where the next one begins.

    Keys lie as the product with the queries reads them: from memory that no cache holds, it takes half the time.
    """

    keys: Tensor
    values: Tensor

    @staticmethod
    def empty(shape: CacheShape, lanes: int, tokens: int) -> Block:
        place = (shape.layers, lanes, shape.heads)
        sizes = (shape.size, tokens), (tokens, shape.size)
        return Block(*(_zeros(place + size, shape) for size in sizes))

    @property
    def tokens(self) -> int:
        return self.values.shape[3]

    def grown(self, shape: CacheShape, lanes: int, tokens: int) -> Block:
        """A larger one with the same content."""
        larger = Block.empty(shape, lanes, tokens)
        larger.keys[:, : self.keys.shape[1], :, :, : self.tokens] = self.keys
        larger.values[:, : self.keys.shape[1], :, : self.tokens] = self.values
        return larger


def _zeros(size: Sequence[int], shape: CacheShape) -> Tensor:
    if shape.device.type == "cpu":
        return zeros_in_large_pages(size, shape.dtype)
    return torch.zeros(tuple(size), dtype=shape.dtype, device=shape.device)


class BlockCache:
    """Every block of the first n lanes is contiguous in each layer."""

    def __init__(self, shape: CacheShape, lanes: int = 0) -> None:
        self.shape = shape
        self.lanes = lanes
        self.blocks: list[Block] = []

    @property
    def tokens(self) -> int:
        return sum(block.tokens for block in self.blocks)

    def reserve(self, lanes: int, tokens: int) -> None:
        lanes, tokens = max(lanes, self.lanes), max(self.shape.capacity(tokens), self.tokens)
        if (lanes, tokens) == (self.lanes, self.tokens):
            return
        for index, (start, stop) in enumerate(block_spans(tokens)):
            if index == len(self.blocks):
                self.blocks.append(Block.empty(self.shape, lanes, stop - start))
            elif lanes > self.lanes or self.blocks[index].tokens < stop - start:
                self.blocks[index] = self.blocks[index].grown(self.shape, lanes, stop - start)
        self.lanes = lanes

    def fill(self, layer: int, lane: int, key: Tensor, value: Tensor) -> None:
        for block, (start, stop) in zip(self.blocks, block_spans(key.shape[0]), strict=False):
            block.keys[layer, lane, :, :, : stop - start] = key[start:stop].permute(1, 2, 0)
            block.values[layer, lane, :, : stop - start] = value[start:stop].transpose(0, 1)

    def move(self, source: int, target: int, tokens: int) -> None:
        for block, (start, stop) in zip(self.blocks, block_spans(tokens), strict=False):
            block.keys[:, target, :, :, : stop - start] = block.keys[:, source, :, :, : stop - start]
            block.values[:, target, :, : stop - start] = block.values[:, source, :, : stop - start]

    def read(self, lane: int, tokens: int) -> list[Tensor]:
        kept: list[Tensor] = []
        for block, (start, stop) in zip(self.blocks, block_spans(tokens), strict=False):
            kept.append(block.keys[:, lane, :, :, : stop - start].clone())
            kept.append(block.values[:, lane, :, : stop - start].clone())
        return kept

    def write(self, lane: int, kept: Sequence[Tensor]) -> None:
        for block, keys, values in zip(self.blocks, kept[::2], kept[1::2], strict=False):
            block.keys[:, lane, :, :, : keys.shape[3]] = keys
            block.values[:, lane, :, : values.shape[2]] = values

    def spans(self, lanes: int, tokens: int) -> list[Span]:
        spans: list[Span] = []
        for block, (start, stop) in zip(self.blocks, block_spans(tokens), strict=False):
            width = width_of(stop - start)
            keys = block.keys[:, :lanes].flatten(1, 2)[..., :width].transpose(2, 3)
            values = block.values[:, :lanes].flatten(1, 2)[:, :, :width]
            spans.append(Span(start, keys.unbind(), values.unbind()))
        return spans

    def plan_write(self, position: Tensor, tokens: Sequence[int]) -> Write:
        if len(set(tokens)) == 1:
            index = block_of(tokens[0])
            return _EvenWrite(self.blocks[index], len(tokens), tokens[0] - block_start(index))
        return _BlockWrite(self.blocks, tokens)


class _EvenWrite:
    """All lanes stand at one token, as they do when they started together."""

    def __init__(self, block: Block, lanes: int, offset: int) -> None:
        self._keys = block.keys[:, :lanes, :, :, offset].unbind()
        self._values = block.values[:, :lanes, :, offset].unbind()

    def put(self, layer: int, key: Tensor, value: Tensor) -> None:
        self._keys[layer].copy_(key)
        self._values[layer].copy_(value)


@dataclass(frozen=True, slots=True)
class _Target:
    block: Block
    lanes: Tensor
    offset: Tensor


class _BlockWrite:
    """Lanes stand at tokens of their own: one write for each block that one of them is in."""

    def __init__(self, blocks: Sequence[Block], tokens: Sequence[int]) -> None:
        by_block: dict[int, list[int]] = {}
        for lane, token in enumerate(tokens):
            by_block.setdefault(block_of(token), []).append(lane)
        self._targets = [
            _Target(
                blocks[index],
                torch.tensor(lanes),
                torch.tensor([tokens[lane] - block_start(index) for lane in lanes]),
            )
            for index, lanes in by_block.items()
        ]

    def put(self, layer: int, key: Tensor, value: Tensor) -> None:
        for target in self._targets:
            target.block.keys[layer, target.lanes, :, :, target.offset] = key[target.lanes]
            target.block.values[layer, target.lanes, :, target.offset] = value[target.lanes]


class ArenaCache:
    """`arena`: `[2, layers, lanes, heads, tokens, size]`. No two arenas, of any cache, have one `generation`: graphs of
    old ones are void."""

    def __init__(self, shape: CacheShape, lanes: int = 0) -> None:
        self.shape = shape
        self.lanes: int = lanes
        self.generation = next(_GENERATIONS)
        self.arena = self._empty(lanes, 0)

    @property
    def tokens(self) -> int:
        return self.arena.shape[4]

    def _empty(self, lanes: int, tokens: int) -> Tensor:
        shape = self.shape
        size = (2, shape.layers, lanes, shape.heads, tokens, shape.size)
        return torch.zeros(size, dtype=shape.dtype, device=shape.device)

    def reserve(self, lanes: int, tokens: int) -> None:
        lanes, tokens = max(lanes, self.lanes), max(self.shape.capacity(tokens), self.tokens)
        if (lanes, tokens) == (self.lanes, self.tokens):
            return
        old, self.arena = self.arena, self._empty(lanes, tokens)
        self.arena[:, :, : old.shape[2], :, : old.shape[4]] = old
        self.lanes = lanes
        self.generation = next(_GENERATIONS)

    def fill(self, layer: int, lane: int, key: Tensor, value: Tensor) -> None:
        self.arena[0, layer, lane, :, : key.shape[0]] = key.transpose(0, 1)
        self.arena[1, layer, lane, :, : value.shape[0]] = value.transpose(0, 1)

    def move(self, source: int, target: int, tokens: int) -> None:
        self.arena[:, :, target, :, :tokens] = self.arena[:, :, source, :, :tokens]

    def read(self, lane: int, tokens: int) -> list[Tensor]:
        return [self.arena[:, :, lane, :, :tokens].clone()]

    def write(self, lane: int, kept: Sequence[Tensor]) -> None:
        self.arena[:, :, lane, :, : kept[0].shape[3]] = kept[0]

    def spans(self, lanes: int, tokens: int) -> list[Span]:
        length = min(round_up(tokens, ARENA_SPAN), self.arena.shape[4])
        keys, values = self.arena[:, :, :lanes].flatten(2, 3)[:, :, :, :length]
        return [Span(0, keys.unbind(), values.unbind())]

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
    return ArenaCache(shape) if shape.fixed else BlockCache(shape)
