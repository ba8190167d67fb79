"""The attention of one decode step: each sample's new token sees its prompt, then its own completion.

A prompt's keys are read once for all its samples: their query rows stand together in one matrix product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from groupwise.engines.native.cache import KeyCache, Span
from groupwise.model.attention import AttentionCall
from groupwise.model.exact import TILE, KeyBlock, Mask, Partial, merge, partial_attention


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
    """The layout of one step; see `groupwise.model.attention.Layout`.

    Args:
        positions: `inputs.position` on the host.
    """

    def __init__(
        self, prompts: KeyCache, samples: KeyCache, *, shape: StepShape, inputs: StepInputs, positions: Sequence[int]
    ) -> None:
        self._prompts = prompts
        self._samples = samples
        self._shape = shape
        self._inputs = inputs
        self._write = samples.plan_write(inputs.position, positions)
        self._masks: dict[int | None, _Masks] = {}

    def attend(self, call: AttentionCall, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        shape, heads = self._shape, self._samples.shape.heads
        lanes, repeat = shape.lanes, query.shape[1] // heads
        query = query[:lanes]
        self._write.put(call.layer, key[:lanes], value[:lanes])
        own_spans = self._samples.spans(call.layer, lanes, shape.sample_tokens)
        shared_spans = self._prompts.spans(call.layer, shape.prompts, shape.prompt_tokens)
        if call.window not in self._masks:
            self._masks[call.window] = _Masks(shape, self._inputs, repeat, call.window, own_spans, shared_spans)
        masks = self._masks[call.window]

        own_query = pad(query.reshape(lanes * heads, repeat, -1), (0, 0, 0, -repeat % TILE))
        own = partial_attention(own_query, _blocks(own_spans, masks.own), call.scale)
        shared_query = _group_rows(self._to_members(query), shape.prompts, heads, repeat)
        shared_query = pad(shared_query, (0, 0, 0, -shared_query.shape[1] % TILE))
        shared = partial_attention(shared_query, _blocks(shared_spans, masks.shared), call.scale)
        seen = Partial(*(self._to_lanes(_ungroup_rows(x, shape, repeat)) for x in _fields(shared)))
        both = merge(seen, Partial(*(_lane_rows(x, lanes, repeat) for x in _fields(own))))
        out = both.out.div_(both.mass[..., None]).to(query.dtype).reshape(lanes, heads * repeat, -1)
        return pad(out, (0, 0, 0, 0, 0, shape.rows - lanes)) if shape.rows > lanes else out

    def _to_members(self, query: Tensor) -> Tensor:
        """`[B, Hq, d]` by lane to `[prompts * W, Hq, d]` by prompt."""
        if self._shape.in_order:
            return query
        count = self._shape.prompts * self._shape.width
        gathered = query.new_zeros(count + 1, *query.shape[1:])  # the last row takes the padding
        gathered[self._inputs.member] = query
        return gathered[:count]

    def _to_lanes(self, x: Tensor) -> Tensor:
        """The inverse; padded lanes get some member's."""
        if self._shape.in_order:
            return x
        return x[self._inputs.member.clamp(max=x.shape[0] - 1)]


class _Masks:
    """What is hidden in each span, for all layers with one window."""

    def __init__(
        self,
        shape: StepShape,
        inputs: StepInputs,
        repeat: int,
        window: int | None,
        own_spans: Sequence[Span],
        shared_spans: Sequence[Span],
    ) -> None:
        heads = own_spans[0].key.shape[0] // shape.lanes
        lengths = inputs.prompt_lengths[:, None]
        at = _row_positions(shape, inputs, repeat) if window is not None else None
        self.own: list[Mask | None] = []
        for span in own_spans:
            distance = inputs.position[:, None] - _tokens_of(span)
            hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
            self.own.append(_mask(hidden[:, None], heads, span.key))
        self.shared: list[Mask | None] = []
        for span in shared_spans:
            token = _tokens_of(span)
            hidden = (token >= lengths)[:, None]
            if window is not None and at is not None:
                hidden = hidden | (at[..., None] - token >= window)
            self.shared.append(_mask(hidden, heads, span.key))


def _tokens_of(span: Span) -> Tensor:
    return torch.arange(span.start, span.start + span.key.shape[1], device=span.key.device)


def _mask(hidden: Tensor, heads: int, key: Tensor) -> Mask | None:
    """One mask per lane becomes one per lane and head; on a CPU, where asking is free, None if nothing is hidden."""
    if key.device.type == "cpu" and not hidden.any():
        return None
    return Mask.of(hidden.repeat_interleave(heads, 0), key.dtype)


def _row_positions(shape: StepShape, inputs: StepInputs, repeat: int) -> Tensor:
    """`[prompts, R]`, the position from the prompt's start of each query row that sees it, R padded to `TILE`."""
    count = shape.prompts * shape.width
    at = inputs.position.new_zeros(count + 1)
    at[inputs.member] = inputs.position
    at = (at[:count].view(shape.prompts, shape.width) + inputs.prompt_lengths[:, None]).repeat_interleave(repeat, 1)
    return pad(at, (0, -at.shape[1] % TILE))


def _blocks(spans: Sequence[Span], masks: Sequence[Mask | None]) -> list[KeyBlock]:
    return [KeyBlock(span.key, span.value, 0, mask) for span, mask in zip(spans, masks, strict=True)]


def _lane_rows(x: Tensor, lanes: int, repeat: int) -> Tensor:
    """`[B * heads, R, …]` as `[B, heads, repeat, …]`, a view without the padding rows."""
    return x.unflatten(0, (lanes, -1))[:, :, :repeat]


def _fields(part: Partial) -> list[Tensor]:
    return [part.out, part.top, part.mass]


def _group_rows(x: Tensor, count: int, heads: int, repeat: int) -> Tensor:
    """`[count * W, heads * repeat, d]` to `[count * heads, W * repeat, d]`."""
    return x.view(count, -1, heads, repeat, x.shape[-1]).transpose(1, 2).reshape(count * heads, -1, x.shape[-1])


def _ungroup_rows(x: Tensor, shape: StepShape, repeat: int) -> Tensor:
    """`[prompts * heads, R, …]` to `[prompts * W, heads, repeat, …]`, padding rows dropped."""
    count, width, tail = shape.prompts, shape.width, x.shape[2:]
    heads = x.shape[0] // count
    x = x[:, : width * repeat].reshape(count, heads, width, repeat, *tail).transpose(1, 2)
    return x.reshape(count * width, heads, repeat, *tail)
