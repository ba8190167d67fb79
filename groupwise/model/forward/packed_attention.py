"""Attention over a packed sequence: exact blocks on a CPU, variable-length flash attention on a GPU.

Both compute the same thing (`packing.py` draws it). The CPU form is the one whose bits equal decoding's; a
GPU takes it for float32, for which there is no flash attention.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from groupwise.model.exact.attention_backward import NO_WEIGHT, Grads, Rows, attention_backward
from groupwise.model.exact.blocks import (
    TILE,
    Found,
    KeyBlock,
    causal_blocks,
    full_rows,
    padded_keys,
    prefix_blocks,
    score,
)
from groupwise.model.exact.buckets import Bucket, make_buckets
from groupwise.model.forward.attention import AttentionCall
from groupwise.model.forward.packing import Packed, Segment
from groupwise.model.forward.segment_gradient import segment_gradient

if TYPE_CHECKING:
    from groupwise.model.forward.varlen_attention import VarlenPlan


_ROW_TOKENS = 128  # whose rows meet their keys together
_NEAR_SCORES = 1 << 19  # scores that exist at one time: 1 MiB in float32


@dataclass(frozen=True, slots=True)
class Prefix:
    """A prompt and the rows that see it: all completions of its group, neighbours in the packed sequence."""

    prompt: Segment
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Plan:
    """The work of one packed sequence, found once and used by every layer."""

    buckets: tuple[Bucket, ...]
    prefixes: tuple[Prefix, ...]
    position_ids: Tensor

    def to(self, device: torch.device) -> Plan:
        buckets = tuple(bucket.to(device) for bucket in self.buckets)
        return Plan(buckets, self.prefixes, self.position_ids.to(device))


@dataclass(frozen=True, slots=True)
class Kept:
    """What a backward pass reads: `query, out [N, Hq, d]`, `key, value [N, Hkv, d]`, and each row's log-sum-exp over
    all keys that it sees, `log_mass [N, Hq]`."""

    query: Tensor
    key: Tensor
    value: Tensor
    out: Tensor
    log_mass: Tensor


class SegmentGradient(Protocol):
    """See `groupwise.model.exact.attention_backward.attention_backward`."""

    def __call__(self, rows: Rows, key: Tensor, value: Tensor, call: AttentionCall, *, causal: bool) -> Grads: ...


def make_plan(packed: Packed, num_heads: int) -> Plan:
    """Sort segments into buckets, and groups into prefixes."""
    buckets = make_buckets(packed.segments, num_heads)
    return Plan(buckets, tuple(_prefixes(packed.segments)), packed.position_ids)


def _prefixes(segments: tuple[Segment, ...]) -> list[Prefix]:
    prefixes: dict[int, Prefix] = {}
    for segment in segments:
        if segment.prefix is None:
            continue
        known = prefixes.get(segment.prefix)
        assert known is None or known.stop == segment.start, "completions of one prompt are not neighbours"
        start = segment.start if known is None else known.start
        prefixes[segment.prefix] = Prefix(segments[segment.prefix], start, segment.stop)
    return list(prefixes.values())


class PackedLayout:
    """The layout of training and prefill.

    Args:
        packed: on the model's device.
        num_heads: query heads, for sizing the work.
        on_keys: called with layer, keys and values `[N, Hkv, d]` of every attention module: how the engine fills its
            cache.
    """

    def __init__(
        self, packed: Packed, num_heads: int, *, on_keys: Callable[[int, Tensor, Tensor], None] | None = None
    ) -> None:
        self._on_keys = on_keys
        self._packed = packed
        self._num_heads = num_heads

    @cached_property
    def _plan(self) -> Plan:
        return make_plan(self._packed, self._num_heads).to(self._packed.token_ids.device)

    @cached_property
    def _varlen(self) -> VarlenPlan:
        from groupwise.model.forward.varlen_attention import VarlenPlan

        return VarlenPlan(self._packed)

    def attend(self, call: AttentionCall, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if self._on_keys is not None:
            self._on_keys(call.layer, key, value)
        if query.device.type == "cpu" or query.dtype in (torch.float32, torch.float64):
            return _ExactAttention.apply(query, key, value, self._plan, call)
        from groupwise.model.forward.varlen_attention import varlen_attention

        return varlen_attention(query, key, value, self._varlen, call)


class _Prefixed:
    """One prefix's tensors in head layout: `key, value [Hkv, T, d]` padded to blocks, and its rows' slicing."""

    def __init__(self, prefix: Prefix, key: Tensor, value: Tensor, repeat: int) -> None:
        self.rows = slice(prefix.start, prefix.stop)
        self.keys = slice(prefix.prompt.start, prefix.prompt.stop)
        self.length = prefix.prompt.length
        self.repeat = repeat
        rows = (prefix.stop - prefix.start) * repeat
        # Beside keys that lie token by token, one tile of queries has another order of sums (float32, heads of 128).
        self._missing_rows = full_rows(max(rows, 2 * TILE), key, key.shape[1]) - rows
        missing = padded_keys(self.length) - self.length
        self.key = pad(key[self.keys].transpose(0, 1), (0, 0, 0, missing))
        self.value = pad(value[self.keys].transpose(0, 1), (0, 0, 0, missing))

    def gather(self, x: Tensor) -> Tensor:
        """Rows `[N, Hq, …]` of this prefix as `[Hkv, R, …]`, R padded to full rows."""
        rows = x[self.rows]
        groups = rows.shape[1] // self.repeat
        heads = rows.unflatten(1, (groups, self.repeat)).transpose(0, 1).flatten(1, 2)
        return pad(heads, (0, 0) * (heads.dim() - 2) + (0, self._missing_rows))

    def scatter(self, x: Tensor) -> Tensor:
        """`[Hkv, R, …]` back to `[rows, Hq, …]`."""
        x = x[:, : x.shape[1] - self._missing_rows] if self._missing_rows else x
        return x.unflatten(1, (-1, self.repeat)).transpose(0, 1).flatten(1, 2)

    def blocks(self, position_ids: Tensor, window: int | None) -> list[KeyBlock]:
        distance = None
        if window is not None:
            distance = pad(position_ids[self.rows].repeat_interleave(self.repeat), (0, self._missing_rows))
        return prefix_blocks(self.key, self.value, self.length, distance, window)


class _ExactAttention(torch.autograd.Function):
    """Queries `[N, Hq, d]`, keys and values `[N, Hkv, d]` in, `[N, Hq, d]` out; padding rows come out zero."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, plan: Plan, call: AttentionCall) -> Tensor:
        repeat = query.shape[1] // key.shape[1]
        sums = torch.promote_types(query.dtype, torch.float32)
        out = query.new_zeros(query.shape, dtype=sums)
        mass = torch.ones_like(out[..., 0])
        top = torch.full_like(mass, -torch.inf)
        prefixed = [_Prefixed(prefix, key, value, repeat) for prefix in plan.prefixes]
        met = [score(each.gather(query), each.blocks(plan.position_ids, call.window), call.scale) for each in prefixed]
        for each, scores in zip(prefixed, met, strict=True):
            top[each.rows] = each.scatter(scores.found.top)
        for bucket in plan.buckets:
            found = _found_by_itself(
                bucket.gather(query, repeat),
                bucket.gather(key, 1),
                bucket.gather(value, 1),
                bucket.gather(top, repeat),
                call,
            )
            for whole, part in ((out, found.out), (top, found.top), (mass, found.mass)):
                bucket.scatter(part, repeat, whole)
        for each, scores in zip(prefixed, met, strict=True):
            found = scores.sum(each.gather(top))
            out[each.rows].add_(each.scatter(found.out))
            mass[each.rows].add_(each.scatter(found.mass))
        result = out.div_(mass[..., None]).to(query.dtype)
        ctx.save_for_backward(query, key, value, result, top.add_(mass.log_()))
        ctx.plan, ctx.call = plan, call
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        kept = Kept(*ctx.saved_tensors)
        one_segment = attention_backward if kept.query.device.type == "cpu" else segment_gradient
        found = gradients_by_plan(kept, grads[0], ctx.plan, ctx.call, one_segment)
        return found.query, found.key, found.value, None, None


def _found_by_itself(query: Tensor, key: Tensor, value: Tensor, top: Tensor, call: AttentionCall) -> Found:
    """What segments `[B, T, d]` find in themselves, for queries `[B, T * repeat, d]` that have met scores up to `top
    [B, T * repeat]`. Some segments and rows at a time, so that their scores stay in the processor's cache; no row's
    bits depend on which."""
    length = key.shape[1]
    repeat = query.shape[1] // length
    found = Found.empty(query)
    tokens = min(length, _ROW_TOKENS)
    for first in range(0, length, tokens):
        last = min(first + tokens, length)
        rows = slice(first * repeat, last * repeat)
        step = max(1, _NEAR_SCORES // ((last - first) * repeat * last)) if query.device.type == "cpu" else len(query)
        for start in range(0, len(query), step):
            some = slice(start, start + step)
            blocks = causal_blocks(key[some, :last], value[some, :last], repeat, call.window, first)
            met = score(query[some, rows], blocks, call.scale)
            torch.maximum(met.found.top, top[some, rows], out=met.found.top)
            part = met.sum()
            for whole, own in ((found.top, part.top), (found.mass, part.mass), (found.out, part.out)):
                whole[some, rows] = own
    return found


def gradients_by_plan(kept: Kept, grad: Tensor, plan: Plan, call: AttentionCall, one_segment: SegmentGradient) -> Grads:
    """Gradients `[N, Hq, d]` and `[N, Hkv, d]`, from `grad [N, Hq, d]` of the result: the sum over all key segments."""
    query, key, value, result, log_mass = kept.query, kept.key, kept.value, kept.out, kept.log_mass
    dq, dk, dv = (torch.zeros_like(x, dtype=log_mass.dtype) for x in (query, key, value))
    for bucket in plan.buckets:
        asking = bucket.pick(query)
        parts = one_segment(
            Rows(
                query=asking,
                grad=bucket.pick(grad, lost=0),
                out=bucket.pick(result),
                log_mass=bucket.pick(log_mass, lost=NO_WEIGHT),
                distance=torch.arange(asking.shape[1], device=query.device),
            ),
            bucket.pick(key),
            bucket.pick(value),
            call,
            causal=True,
        )
        for whole, part in ((dq, parts.query), (dk, parts.key), (dv, parts.value)):
            bucket.put(part, whole)
    for prefix in plan.prefixes:
        seen, by = slice(prefix.prompt.start, prefix.prompt.stop), slice(prefix.start, prefix.stop)
        rows = Rows(query[None, by], grad[None, by], result[None, by], log_mass[None, by], plan.position_ids[by])
        parts = one_segment(rows, key[None, seen], value[None, seen], call, causal=False)
        for whole, place, part in ((dq, by, parts.query), (dk, seen, parts.key), (dv, seen, parts.value)):
            whole[place].add_(part[0])
    return Grads(dq.to(query.dtype), dk.to(key.dtype), dv.to(value.dtype))
