"""Attention over a packed sequence: exact blocks on a CPU, variable-length flash attention on a GPU.

Both compute the same thing (`groupwise.model.packing` draws it). The CPU form is the one whose bits equal decoding's;
its backward recomputes the weights from the row's log-sum-exp (Dao 2023, "FlashAttention-2", algorithm 2), so nothing
of size tokens x tokens outlives one layer. The GPU form gives each completion a copy of its prompt's keys and values,
which is cheap beside the linear layers that ran on the prompt once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from groupwise.model.attention import AttentionCall
from groupwise.model.exact import (
    BLOCK,
    TILE,
    KeyBlock,
    Partial,
    Scorer,
    causal_blocks,
    merge,
    partial_attention,
    prefix_blocks,
    weigh,
    wide,
)
from groupwise.model.packing import Packed, Segment

_NO_WEIGHT = 1e30  # a row with this log-sum-exp weighs every key zero, or next to zero where the gradient is zero
_MAX_SCORES = 1 << 26  # float32 scores of one bucket that exist at one time: 256 MiB


@dataclass(frozen=True, slots=True)
class Bucket:
    """Segments of about one length, computed together: `index [n, T]` into the packed sequence, `real [n * T]` rows
    that exist.

    Attributes:
        flat: `[V]`, packed positions of the real rows; `real`: `[V]`, their places in the flattened `[n * T]`.
    """

    index: Tensor
    flat: Tensor
    real: Tensor


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


def make_plan(packed: Packed, num_heads: int) -> Plan:
    """Sort segments into buckets by blocks of length, and groups into prefixes."""
    by_length: dict[int, list[Segment]] = {}
    for segment in packed.segments:
        by_length.setdefault(-(-segment.length // BLOCK) * BLOCK, []).append(segment)
    buckets: list[Bucket] = []
    for length, segments in sorted(by_length.items()):
        most = max(1, _MAX_SCORES // (num_heads * length * length))
        starts = range(0, len(segments), most)
        buckets += [_bucket(segments[first : first + most], length) for first in starts]
    return Plan(tuple(buckets), tuple(_prefixes(packed.segments)), packed.position_ids)


def _bucket(segments: list[Segment], length: int) -> Bucket:
    offset = torch.arange(length)
    start = torch.tensor([s.start for s in segments])[:, None]
    exists = offset[None] < torch.tensor([s.length for s in segments])[:, None]
    index = torch.where(exists, start + offset, start)
    real = exists.flatten().nonzero().flatten()
    return Bucket(index, index.flatten()[real], real)


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
        self._exact = packed.token_ids.device.type == "cpu"
        if self._exact:
            self._plan = make_plan(packed, num_heads)
        else:
            from groupwise.model.varlen_attention import make_varlen_plan

            self._varlen = make_varlen_plan(packed)

    def attend(self, call: AttentionCall, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if self._on_keys is not None:
            self._on_keys(call.layer, key, value)
        if self._exact:
            return _ExactAttention.apply(query, key, value, self._plan, call)
        from groupwise.model.varlen_attention import varlen_attention

        return varlen_attention(query, key, value, self._varlen, call)


def _gather(x: Tensor, index: Tensor, repeat: int) -> Tensor:
    """Tokens `index [n, T]` of `[N, Hkv * repeat, d]` as `[Hkv * n, T * repeat, d]`, one key head's rows together."""
    heads = x.unflatten(1, (-1, repeat)).transpose(0, 1)[:, index.flatten()]
    return heads.reshape(heads.shape[0] * index.shape[0], -1, x.shape[-1])


def _scatter(x: Tensor, bucket: Bucket, repeat: int, into: Tensor) -> None:
    """The inverse: `[Hkv * n, T * repeat, …]` to the bucket's places in `[N, Hkv * repeat, …]`."""
    n, length = bucket.index.shape
    heads = x.view(-1, n * length, repeat, *x.shape[2:])
    into.unflatten(1, (-1, repeat)).transpose(0, 1)[:, bucket.flat] = heads[:, bucket.real]


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


class _Prefixed:
    """One prefix's tensors in head layout: `key, value [Hkv, T, d]` padded to blocks, and its rows' slicing."""

    def __init__(self, prefix: Prefix, key: Tensor, value: Tensor, repeat: int) -> None:
        self.rows = slice(prefix.start, prefix.stop)
        self.keys = slice(prefix.prompt.start, prefix.prompt.stop)
        self.length = prefix.prompt.length
        self.repeat = repeat
        self._missing_rows = -(prefix.stop - prefix.start) * repeat % TILE
        missing = _round_up(self.length, BLOCK) - self.length
        self.key = pad(key[self.keys].transpose(0, 1), (0, 0, 0, missing))
        self.value = pad(value[self.keys].transpose(0, 1), (0, 0, 0, missing))

    def gather(self, x: Tensor, fill: float = 0.0) -> Tensor:
        """Rows `[N, Hq, …]` of this prefix as `[Hkv, R, …]`, R padded to `TILE`."""
        rows = x[self.rows]
        groups = rows.shape[1] // self.repeat
        heads = rows.unflatten(1, (groups, self.repeat)).transpose(0, 1).flatten(1, 2)
        return pad(heads, (0, 0) * (heads.dim() - 2) + (0, self._missing_rows), value=fill)

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
        top = query.new_zeros(query.shape[:2], dtype=sums)
        mass = torch.ones_like(top)
        for bucket in plan.buckets:
            blocks = causal_blocks(_gather(key, bucket.index, 1), _gather(value, bucket.index, 1), repeat, call.window)
            own = partial_attention(_gather(query, bucket.index, repeat), blocks, call.scale)
            for whole, part in ((out, own.out), (top, own.top), (mass, own.mass)):
                _scatter(part, bucket, repeat, whole)
        for prefix in plan.prefixes:
            shared = _Prefixed(prefix, key, value, repeat)
            part = partial_attention(shared.gather(query), shared.blocks(plan.position_ids, call.window), call.scale)
            seen = Partial(shared.scatter(part.out), shared.scatter(part.top), shared.scatter(part.mass))
            both = merge(seen, Partial(out[shared.rows], top[shared.rows], mass[shared.rows]))
            out[shared.rows], top[shared.rows], mass[shared.rows] = both.out, both.top, both.mass
        result = out.div_(mass[..., None]).to(query.dtype)
        ctx.save_for_backward(query, key, value, result, top.add_(mass.log_()))
        ctx.plan, ctx.call = plan, call
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value, result, log_mass = ctx.saved_tensors
        plan, call = ctx.plan, ctx.call
        grad = grads[0]
        repeat = query.shape[1] // key.shape[1]
        delta = (wide(grad) * wide(result)).sum(-1)
        dq, dk, dv = (torch.zeros_like(x, dtype=delta.dtype) for x in (query, key, value))
        for bucket in plan.buckets:
            lost = torch.ones(bucket.index.numel(), dtype=torch.bool)
            lost[bucket.real] = False
            lost = lost.view_as(bucket.index).repeat(key.shape[1], 1).repeat_interleave(repeat, 1)
            rows = _Rows(
                query=_gather(query, bucket.index, repeat),
                grad=_gather(grad, bucket.index, repeat).masked_fill_(lost[..., None], 0),
                log_mass=_gather(log_mass[..., None], bucket.index, repeat)[..., 0].masked_fill_(lost, _NO_WEIGHT),
                delta=_gather(delta[..., None], bucket.index, repeat)[..., 0],
            )
            blocks = causal_blocks(_gather(key, bucket.index, 1), _gather(value, bucket.index, 1), repeat, call.window)
            parts = _backward(rows, blocks, call.scale)
            _scatter(parts.query, bucket, repeat, dq)
            _scatter(parts.key, bucket, 1, dk)
            _scatter(parts.value, bucket, 1, dv)
        for prefix in plan.prefixes:
            shared = _Prefixed(prefix, key, value, repeat)
            rows = _Rows(
                query=shared.gather(query),
                grad=shared.gather(grad),
                log_mass=shared.gather(log_mass, fill=_NO_WEIGHT),
                delta=shared.gather(delta),
            )
            parts = _backward(rows, shared.blocks(plan.position_ids, call.window), call.scale)
            dq[shared.rows] += shared.scatter(parts.query)
            dk[shared.keys] += parts.key[:, : shared.length].transpose(0, 1)
            dv[shared.keys] += parts.value[:, : shared.length].transpose(0, 1)
        return dq.to(query.dtype), dk.to(key.dtype), dv.to(value.dtype), None, None


@dataclass(frozen=True, slots=True)
class _Rows:
    """What the backward pass needs of its query rows: `[B, R, d]`, `[B, R, d]`, `[B, R]`, `[B, R]`"""

    query: Tensor
    grad: Tensor
    log_mass: Tensor
    delta: Tensor


@dataclass(frozen=True, slots=True)
class _Grads:
    query: Tensor
    key: Tensor
    value: Tensor


def _backward(rows: _Rows, blocks: list[KeyBlock], scale: float) -> _Grads:
    """Gradients of one key segment, weights recomputed from the merged log-sum-exp."""
    dtype = rows.query.dtype
    dq = torch.zeros_like(rows.query, dtype=rows.delta.dtype)
    scorer = Scorer(rows.query, scale)
    dks: list[Tensor] = []
    dvs: list[Tensor] = []
    for block in blocks:
        first = block.first_row
        grad = rows.grad[:, first:]
        weights = weigh(scorer.scores(block), rows.log_mass[:, first:], block)
        dvs.append(wide(torch.bmm(weights.to(dtype).transpose(1, 2), grad)))
        dscore = wide(torch.bmm(grad, block.value.transpose(1, 2)))
        dscore = dscore.sub_(rows.delta[:, first:, None]).mul_(weights).mul_(scale).to(dtype)
        dq[:, first:] += wide(torch.bmm(dscore, block.key))
        dks.append(wide(torch.bmm(dscore.transpose(1, 2), rows.query[:, first:])))
    return _Grads(dq, torch.cat(dks, 1), torch.cat(dvs, 1))
