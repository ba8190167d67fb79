"""The attention of one decode step: each sample's new token sees its prompt, then its own completion.

A prompt's keys are read once for all its samples: their query rows stand together in one matrix product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from groupwise.engines.native.cache import KeyCache, Span
from groupwise.model.exact.blocks import (
    LARGEST,
    NARROWEST,
    Found,
    KeyBlock,
    Mask,
    few_rows,
    full_rows,
    score,
    split_scale,
)
from groupwise.model.forward.attention import AttentionCall

_Masks = list[Mask | None]  # one for each span


@dataclass(frozen=True, slots=True)
class StepShape:
    """The sizes of a step; two steps of one shape run the same kernels.

    Attributes:
        rows: N, of the linear layers: lanes and padding, which attends to nothing.
        lanes: B, samples; on a GPU, and padding.
        prompts: prompt lanes and padding; width: W, most samples of one prompt.
        sample_tokens, prompt_tokens: keys that are read of each sample and each prompt.
        in_order: lane i is member i of the prompts' rows, none missing, so rows need no sorting.
    """

    rows: int
    lanes: int
    prompts: int
    width: int
    sample_tokens: int
    prompt_tokens: int
    in_order: bool

    @property
    def by_lane(self) -> tuple[int, ...]:
        """How lanes are laid out: `[B]`, or as members of prompts, `[prompts, W]`, where that is the same."""
        return (self.prompts, self.width) if self.in_order else (self.lanes,)


@dataclass(frozen=True, slots=True)
class StepInputs:
    """What a step reads, all int64.

    Attributes:
        tokens, position_ids: `[N]`, the tokens fed and their places in the whole sequence.
        position: `[B]`, each token's place in its completion, 0 for the first.
        member: `[B]`, prompt lane x W + place among the prompt's samples; padding has prompts x W.
        prompt_lengths: `[prompts]`; padding has 1.
    """

    tokens: Tensor
    position_ids: Tensor
    position: Tensor
    member: Tensor
    prompt_lengths: Tensor

    @property
    def tensors(self) -> list[Tensor]:
        return [self.tokens, self.position_ids, self.position, self.member, self.prompt_lengths]


class DecodeLayout:
    """The `Layout` (`model/forward/attention.py`) of the steps of one shape, as long as the same samples run."""

    def __init__(self, prompts: KeyCache, samples: KeyCache, shape: StepShape) -> None:
        self._shape = shape
        self._samples = samples
        self._heads = samples.shape.heads
        self._own = samples.spans(shape.lanes, shape.sample_tokens)
        self._shared = prompts.spans(shape.prompts, shape.prompt_tokens)
        self._rows: _Rows | None = None
        self._own_masks: dict[int | None, _Masks] = {}
        self._shared_masks: dict[int | None, _Masks] = {}

    def stand_at(self, inputs: StepInputs, positions: Sequence[int]) -> None:
        """Go to one step.

        Args:
            positions: `inputs.position` on the host; empty where the host must not know.
        """
        self._inputs = inputs
        self._write = self._samples.plan_write(inputs.position, positions)
        self._at = positions[0] if len(set(positions)) == 1 and not self._samples.shape.fixed else None
        self._own_masks.clear()
        # Without a window, a prompt looks alike from everywhere behind it.
        self._shared_masks = {None: self._shared_masks[None]} if None in self._shared_masks else {}

    def attend(self, call: AttentionCall, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        shape, heads = self._shape, self._heads
        lanes, repeat, size = shape.lanes, query.shape[1] // heads, query.shape[2]
        self._write.put(call.layer, key[:lanes], value[:lanes])
        if self._rows is None:
            self._rows = _Rows.of(shape, heads, query)
        rows = self._rows
        if call.window not in self._own_masks:
            self._own_masks[call.window] = self._hide_own(call.window)
        if call.window not in self._shared_masks:
            self._shared_masks[call.window] = self._hide_shared(call.window, repeat, rows.shared.query.shape[1])

        factor, left = split_scale(query.dtype, call.scale)
        asking = (query[:lanes] if shape.rows > lanes else query).view(*shape.by_lane, heads, repeat, size)
        torch.mul(asking, factor, out=rows.own.query_rows)
        torch.mul(self._to_members(asking), factor, out=rows.shared.query_rows)
        own_blocks = _blocks(self._own, call.layer, self._own_masks[call.window])
        shared_blocks = _blocks(self._shared, call.layer, self._shared_masks[call.window])
        own = score(rows.own.query, own_blocks, left, rows.own.found, tile=rows.own.query.shape[1])
        shared = score(rows.shared.query, shared_blocks, left, rows.shared.found)

        # One maximum for both segments, written where each keeps its own.
        top = rows.own.rows.top
        torch.maximum(top, self._to_lanes(rows.shared.rows.top), out=top)
        rows.shared.rows.top.copy_(self._to_members(top))
        own.sum()
        shared.sum()
        seen = rows.shared.rows
        torch.add(self._to_lanes(seen.out), rows.own.rows.out, out=rows.out)
        torch.add(self._to_lanes(seen.mass), rows.own.rows.mass, out=rows.mass)
        rows.out.div_(rows.mass[..., None])
        out = rows.out.view(lanes, heads * repeat, size).to(query.dtype)
        return pad(out, (0, 0, 0, 0, 0, shape.rows - lanes)) if shape.rows > lanes else out

    def _hide_own(self, window: int | None) -> _Masks:
        """Later tokens than a sample's newest one, and those that its window does not reach."""
        if self._at is not None and window is None:
            return [_upto(self._at - span.start, span) for span in self._own]
        position = self._inputs.position if self._at is None else self._inputs.position[:1]
        masks: list[Mask | None] = []
        for span in self._own:
            distance = position[:, None] - _tokens_of(span)
            hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
            masks.append(_mask(hidden[:, None], self._heads if self._at is None else 1, span.keys[0]))
        return masks

    def _hide_shared(self, window: int | None, repeat: int, rows: int) -> _Masks:
        """What lies behind a prompt's end, and what a sample's window does not reach."""
        lengths = self._inputs.prompt_lengths[:, None]
        at = None if window is None else _row_positions(self._shape, self._inputs, repeat, rows)
        masks: list[Mask | None] = []
        for span in self._shared:
            token = _tokens_of(span)
            hidden = (token >= lengths)[:, None]
            if window is not None and at is not None:
                hidden = hidden | (at[..., None] - token >= window)
            masks.append(_mask(hidden, self._heads, span.keys[0]))
        return masks

    def _to_members(self, x: Tensor) -> Tensor:
        """By lane, `[*by_lane, heads, repeat, …]`, to by prompt, `[prompts, W, heads, repeat, …]`."""
        shape = self._shape
        if shape.in_order:
            return x
        gathered = x.new_zeros(shape.prompts * shape.width + 1, *x.shape[1:])  # the last row takes the padding
        gathered[self._inputs.member] = x
        return gathered[:-1].reshape(shape.prompts, shape.width, *x.shape[1:])

    def _to_lanes(self, x: Tensor) -> Tensor:
        """The inverse, in which padded lanes get some member's."""
        if self._shape.in_order:
            return x
        x = x.flatten(0, 1)
        return x[self._inputs.member.clamp(max=x.shape[0] - 1)]


@dataclass(frozen=True, slots=True)
class _Meeting:
    """Query rows that meet one kind of keys, and what they find: zeros stand where rows are missing to full tiles.

    Attributes:
        query: `[lanes * heads, R, d]`; query_rows: the real ones, `[…, heads, repeat, d]`.
        found: of all rows; rows: of the real ones, `[…, heads, repeat, …]`.
    """

    query: Tensor
    query_rows: Tensor
    found: Found
    rows: Found

    @staticmethod
    def of(query: Tensor, real: Callable[[Tensor], Tensor]) -> _Meeting:
        found = Found.empty(query)
        return _Meeting(query, real(query), found, Found(real(found.top), real(found.mass), real(found.out)))


@dataclass(frozen=True, slots=True)
class _Rows:
    """Memory for the rows of a layer, in which all layers of all steps write over each other.

    Attributes:
        own: rows by lane, before their completions' keys, `[*by_lane, heads, repeat, …]`.
        shared: rows by prompt, before their prompts' keys, `[prompts, W, heads, repeat, …]`.
        out, mass: the sums of both, by lane.
    """

    own: _Meeting
    shared: _Meeting
    out: Tensor
    mass: Tensor

    @staticmethod
    def of(shape: StepShape, heads: int, query: Tensor) -> _Rows:
        """For `query [N, Hq, d]`."""
        repeat, size = query.shape[1] // heads, query.shape[2]
        asking = shape.width * repeat
        tile = few_rows(repeat, query, shape.lanes * heads)
        tiles = full_rows(asking, query, shape.prompts * heads)

        def by_lane(x: Tensor) -> Tensor:
            places = (*shape.by_lane, heads, tile, *x.shape[2:])
            return x.view(places).narrow(len(shape.by_lane) + 1, 0, repeat)

        def by_member(x: Tensor) -> Tensor:
            places = (shape.prompts, heads, shape.width, repeat, *x.shape[2:])
            return x[:, :asking].view(places).transpose(1, 2)

        own = _Meeting.of(query.new_zeros(shape.lanes * heads, tile, size), by_lane)
        shared = _Meeting.of(query.new_zeros(shape.prompts * heads, tiles, size), by_member)
        return _Rows(own, shared, torch.empty_like(own.rows.out), torch.empty_like(own.rows.mass))


def _upto(token: int, span: Span) -> Mask | None:
    """The mask of a span whose keys are seen up to `token`, counted from its start."""
    width = span.keys[0].shape[1]
    if token >= width - 1:
        return None
    table = _later(span.keys[0].dtype)
    first = token // NARROWEST * NARROWEST
    row, keys = slice(token - first, token - first + 1), slice(0, width - first)
    return Mask(table.bias[:, row, keys], table.keep[:, row, keys], first)


@lru_cache
def _later(dtype: torch.dtype) -> Mask:
    """`[1, NARROWEST, LARGEST]` on a CPU; row t sees the keys up to t."""
    token = torch.arange(LARGEST)
    return Mask.of((token > token[:NARROWEST, None])[None], dtype)


def _tokens_of(span: Span) -> Tensor:
    return torch.arange(span.start, span.start + span.keys[0].shape[1], device=span.keys[0].device)


def _mask(hidden: Tensor, heads: int, key: Tensor) -> Mask | None:
    """One mask per lane becomes one per lane and head; on a CPU, where asking is free, None if nothing is hidden."""
    if key.device.type == "cpu" and not hidden.any():
        return None
    return Mask.of(hidden.repeat_interleave(heads, 0), key.dtype)


def _row_positions(shape: StepShape, inputs: StepInputs, repeat: int, rows: int) -> Tensor:
    """`[prompts, rows]`, the position from the prompt's start of each query row that sees it, and of padding."""
    count = shape.prompts * shape.width
    at = inputs.position.new_zeros(count + 1)
    at[inputs.member] = inputs.position
    at = (at[:count].view(shape.prompts, shape.width) + inputs.prompt_lengths[:, None]).repeat_interleave(repeat, 1)
    return pad(at, (0, rows - at.shape[1]))


def _blocks(spans: Sequence[Span], layer: int, masks: Sequence[Mask | None]) -> list[KeyBlock]:
    return [KeyBlock(span.keys[layer], span.values[layer], 0, mask) for span, mask in zip(spans, masks, strict=True)]
