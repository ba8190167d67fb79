"""Keys and values of prompts and samples, in blocks of tokens, and the attention of one decode step over them.

A cache has lanes: one per prompt, or one per sample. Blocks are allocated when the first lane reaches them, and keep their
place; block-major order makes every block of the first n lanes one contiguous tensor, so nothing is copied to be read.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from groupwise.model.attention import AttentionCall
from groupwise.model.exact import BLOCK, TILE, KeyBlock, Partial, merge, partial_attention


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


class BlockCache:
    """`blocks[b]`: `[2, layers, lanes, heads, BLOCK, size]`, keys and values of tokens `b * BLOCK …`."""

    def __init__(self, shape: CacheShape, lanes: int) -> None:
        self.shape = shape
        self.lanes = lanes
        self.blocks: list[Tensor] = []

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` in every lane. Fresh blocks are zero: masked keys must be finite."""
        shape = self.shape
        while len(self.blocks) * BLOCK < tokens:
            size = (2, shape.layers, self.lanes, shape.heads, BLOCK, shape.size)
            self.blocks.append(torch.zeros(size, dtype=shape.dtype, device=shape.device))

    def widen(self, lanes: int) -> None:
        """More lanes; what the old ones hold stays."""
        for index, block in enumerate(self.blocks):
            self.blocks[index] = pad(block, (0, 0, 0, 0, 0, 0, 0, lanes - self.lanes))
        self.lanes = lanes

    def put(self, layer: int, lane: int, key: Tensor, value: Tensor) -> None:
        """Store a whole prompt: `[P, heads, size]` each."""
        for which, x in enumerate((key, value)):
            for index, part in enumerate(x.transpose(0, 1).split(BLOCK, dim=1)):
                self.blocks[index][which, layer, lane, :, : part.shape[1]] = part

    def move(self, source: int, target: int, tokens: int) -> None:
        """Copy one lane's first `tokens` over another's."""
        for block in self.blocks[: -(-tokens // BLOCK)]:
            block[:, :, target] = block[:, :, source]

    def heads_of(self, block: int, which: int, layer: int, lanes: int) -> Tensor:
        """`[lanes * heads, BLOCK, size]`, a view."""
        return self.blocks[block][which, layer, :lanes].view(lanes * self.shape.heads, BLOCK, self.shape.size)


@dataclass(frozen=True, slots=True)
class DecodeRows:
    """Which samples one decode step feeds. B lanes, padded to `TILE`; W members per prompt at most.

    Attributes:
        used: lanes that hold samples, 0 … used - 1; the padded ones repeat harmless work.
        position: `[B]`, each sample's token within its completion (0 for the first).
        member: `[used]`, prompt lane x W + place of the sample within its prompt's rows.
        width: W.
        prompt_lengths: `[prompts]`.
        num_blocks: blocks that the longest completion uses, the new token included.
    """

    used: int
    position: Tensor
    member: Tensor
    width: int
    prompt_lengths: Tensor
    num_blocks: int


class DecodeLayout:
    """One new token per sample: it sees its prompt, then its own completion.

    A prompt's keys are read once for all its samples: their query rows stand together in one matrix product.
    """

    def __init__(self, prompts: BlockCache, samples: BlockCache, rows: DecodeRows) -> None:
        self._prompts = prompts
        self._samples = samples
        self._rows = rows
        self._masks: dict[int | None, _Masks] = {}
        block = rows.position // BLOCK
        self._targets = [
            (int(index), lanes, rows.position[lanes] % BLOCK)
            for index in block.unique().tolist()
            for lanes in [(block == index).nonzero().flatten()]
        ]

    def attend(self, call: AttentionCall, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        rows = self._rows
        heads, size = self._samples.shape.heads, self._samples.shape.size
        for index, lanes, offset in self._targets:
            block = self._samples.blocks[index]
            block[0, call.layer, lanes, :, offset] = key[lanes]
            block[1, call.layer, lanes, :, offset] = value[lanes]
        if call.window not in self._masks:
            self._masks[call.window] = _Masks(rows, heads, query.shape[1] // heads, call.window, self._prompts)
        masks = self._masks[call.window]

        lanes, repeat = rows.position.shape[0], query.shape[1] // heads
        own_query = pad(query.reshape(lanes * heads, repeat, size), (0, 0, 0, -repeat % TILE))
        own = partial_attention(own_query, self._blocks(self._samples, call.layer, lanes, masks.own), call.scale)
        own = Partial(*(x[:, :repeat].reshape(lanes, heads * repeat, *x.shape[2:]) for x in _fields(own)))

        count = rows.prompt_lengths.shape[0]
        gathered = query.new_zeros(count * rows.width, heads * repeat, size)
        gathered[rows.member] = query[: rows.used]
        shared_query = _group_rows(gathered, count, heads, repeat)
        blocks = self._blocks(self._prompts, call.layer, count, masks.shared)
        shared = partial_attention(pad(shared_query, (0, 0, 0, -shared_query.shape[1] % TILE)), blocks, call.scale)
        member = pad(rows.member, (0, lanes - rows.used))
        seen = Partial(*(_ungroup_rows(x, count, rows.width, repeat)[member] for x in _fields(shared)))

        both = merge(seen, own)
        return both.out.div_(both.mass[..., None]).to(query.dtype)

    def _blocks(self, cache: BlockCache, layer: int, lanes: int, masks: list[Tensor | None]) -> list[KeyBlock]:
        return [
            KeyBlock(cache.heads_of(index, 0, layer, lanes), cache.heads_of(index, 1, layer, lanes), 0, hidden)
            for index, hidden in enumerate(masks)
        ]


class _Masks:
    """What is hidden in each block, for all layers with one window: `own` and `shared`, one entry per block."""

    def __init__(self, rows: DecodeRows, heads: int, repeat: int, window: int | None, prompts: BlockCache) -> None:
        token = torch.arange(BLOCK, device=rows.position.device)
        self.own: list[Tensor | None] = []
        for index in range(rows.num_blocks):
            distance = rows.position[:, None] - (token + index * BLOCK)
            hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
            self.own.append(hidden.repeat_interleave(heads, 0)[:, None])
        self.shared: list[Tensor | None] = []
        longest = int(rows.prompt_lengths.max())
        at = _positions(rows, repeat) if window is not None else None
        for index in range(-(-longest // BLOCK)):
            key = token + index * BLOCK
            hidden = (key >= rows.prompt_lengths[:, None])[:, None]
            if window is not None:
                assert at is not None
                hidden = hidden | (at[..., None] - key >= window)
            self.shared.append(hidden.repeat_interleave(heads, 0))


def _positions(rows: DecodeRows, repeat: int) -> Tensor:
    """`[prompts, R]`, the position from the prompt's start of each query row that sees it, R padded to `TILE`."""
    count = rows.prompt_lengths.shape[0]
    at = torch.zeros(count * rows.width, dtype=torch.int64, device=rows.position.device)
    at[rows.member] = rows.position[: rows.used]
    at = (at.view(count, rows.width) + rows.prompt_lengths[:, None]).repeat_interleave(repeat, 1)
    return pad(at, (0, -at.shape[1] % TILE))


def _fields(part: Partial) -> list[Tensor]:
    return [part.out, part.top, part.mass]


def _group_rows(x: Tensor, count: int, heads: int, repeat: int) -> Tensor:
    """`[count * W, heads * repeat, d]` to `[count * heads, W * repeat, d]`."""
    return x.view(count, -1, heads, repeat, x.shape[-1]).transpose(1, 2).reshape(count * heads, -1, x.shape[-1])


def _ungroup_rows(x: Tensor, count: int, width: int, repeat: int) -> Tensor:
    """`[count * heads, R, …]` to `[count * W, heads * repeat, …]`, padding rows dropped."""
    tail = x.shape[2:]
    heads = x.shape[0] // count
    x = x[:, : width * repeat].reshape(count, heads, width, repeat, *tail).transpose(1, 2)
    return x.reshape(count * width, heads * repeat, *tail)
