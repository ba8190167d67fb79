"""Attention over a packed sequence by the invariant kernel: the layout of training and prefill."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from groupwise.model.forward.attention import AttentionCall
from groupwise.model.forward.packed_attention import Kept, Plan, gradients_by_plan, make_plan
from groupwise.model.forward.packing import Packed, Segment
from groupwise.model.forward.segment_gradient import segment_gradient
from groupwise.model.forward.varlen_attention import VarlenPlan, flash_gradients
from groupwise.model.invariant.launching import aligned


class _Work:
    """One packed sequence's work for every layer: the kernel's `table` of tiles, and the backward pass's plans."""

    def __init__(self, packed: Packed, num_heads: int, heads: int) -> None:
        from groupwise.model.invariant.attention_kernel import BLOCK_ROWS

        self._packed = packed
        self._num_heads = num_heads
        table = tiles_of(packed.segments, tokens=BLOCK_ROWS * heads // num_heads, heads=heads)
        self.table = table.to(packed.token_ids.device, non_blocking=True)

    @cached_property
    def plan(self) -> Plan:
        return make_plan(self._packed, self._num_heads).to(self._packed.token_ids.device)

    @cached_property
    def flash_plan(self) -> VarlenPlan:
        return VarlenPlan(self._packed)


class InvariantPackedLayout:
    """Takes the place of `PackedLayout`; arguments as there."""

    def __init__(
        self, packed: Packed, num_heads: int, *, on_keys: Callable[[int, Tensor, Tensor], None] | None = None
    ) -> None:
        self._packed = packed
        self._num_heads = num_heads
        self._on_keys = on_keys
        self._work: _Work | None = None

    def attend(self, call: AttentionCall, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if self._on_keys is not None:
            self._on_keys(call.layer, key, value)
        if self._work is None:
            self._work = _Work(self._packed, self._num_heads, key.shape[1])
        return _Attention.apply(query, key, value, self._work, call)


def tiles_of(segments: tuple[Segment, ...], *, tokens: int, heads: int) -> Tensor:
    """The kernel's table `[T, 6]` of a packed sequence, `tokens` neighbours to a tile; keys `[N, heads, d]`."""
    lengths = torch.tensor([segment.length for segment in segments])
    starts = torch.tensor([segment.start for segment in segments])
    prefixes = [segments[segment.prefix] if segment.prefix is not None else None for segment in segments]
    prefix_starts = torch.tensor([0 if prefix is None else prefix.start for prefix in prefixes])
    prefix_lengths = torch.tensor([0 if prefix is None else prefix.length for prefix in prefixes])
    counts = -(-lengths // tokens)
    owner = torch.repeat_interleave(torch.arange(len(segments)), counts)
    first = (torch.arange(len(owner)) - (counts.cumsum(0) - counts)[owner]) * tokens
    columns = (
        starts[owner] + first,
        (lengths[owner] - first).clamp(max=tokens),
        prefix_starts[owner] * heads,
        prefix_lengths[owner],
        starts[owner] * heads,
        first,
    )
    return torch.stack(columns, 1)


class _Attention(torch.autograd.Function):
    """Queries `[N, Hq, d]`, keys and values `[N, Hkv, d]` in, `[N, Hq, d]` out; padding rows come out zero."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, work: _Work, call: AttentionCall) -> Tensor:
        from groupwise.model.invariant.attention_kernel import KeySource, Tiles, attend

        heads = key.shape[1]
        keys = KeySource(aligned(key), aligned(value), by_token=heads, by_head=1)
        found = attend(query, Tiles(work.table, keys, keys), heads=heads, scale=call.scale, window=call.window)
        ctx.save_for_backward(query, key, value, found.out, found.log_mass)
        ctx.work, ctx.call = work, call
        return found.out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value, out, log_mass = ctx.saved_tensors
        if query.device.type == "cuda" and query.dtype == torch.bfloat16:
            kept = query, key, value, out, log_mass.t()
            return *flash_gradients(kept, grads[0], ctx.work.flash_plan, ctx.call), None, None
        kept = Kept(query, key, value, out, log_mass)
        found = gradients_by_plan(kept, grads[0], ctx.work.plan, ctx.call, segment_gradient)
        return found.query, found.key, found.value, None, None
