"""The GPU form of packed attention: torch's variable-length flash attention, a prompt's keys read where they lie.

Two calls per layer: every segment before itself, causally; then all completions of a prompt together before that
prompt, which hides nothing. Each gives a row's result and the log of its sum of exponentials, by which the two are put
together. The backward pass of either part is flash attention's own with the whole row's result and log-sum: a weight's
gradient needs no more (Dao et al. 2022, "FlashAttention", appendix B.2).

A layer with a sliding window is one call, in which each completion has a copy of its prompt's keys before its own:
causal masks of unequal lengths align at the end.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from groupwise.model.forward.attention import AttentionCall
from groupwise.model.forward.packing import Packed, Segment


@dataclass(frozen=True, slots=True)
class Sequences:
    """What one call of flash attention computes.

    Attributes:
        queries, keys: cumulative lengths `[S + 1]` int32.
        longest_query, longest_key: of one sequence.
    """

    queries: Tensor
    keys: Tensor
    longest_query: int
    longest_key: int

    @staticmethod
    def of(queries: Sequence[int], keys: Sequence[int], device: torch.device) -> Sequences:
        asking, seen = (torch.tensor([0, *some]).cumsum(0).to(device, torch.int32) for some in (queries, keys))
        return Sequences(asking, seen, max(queries), max(keys))


class VarlenPlan:
    """One packed sequence's work for every layer.

    Attributes:
        num_queries: packed tokens without padding.
        own: every segment before itself.
        rows, num_keys: completions are the packed tokens from `rows` on; their prompts end at `num_keys`.
        prompts: completions before their prompts, or None where there are none.
    """

    def __init__(self, packed: Packed) -> None:
        self._segments = packed.segments
        self._device = packed.token_ids.device
        lengths = [segment.length for segment in packed.segments]
        self.num_queries = sum(lengths)
        self.own = Sequences.of(lengths, lengths, self._device)
        alone = [segment for segment in packed.segments if segment.prefix is None]
        self.num_keys = sum(segment.length for segment in alone)
        self.rows = self.num_keys
        self.prompts = self._before_prompts(alone)

    def _before_prompts(self, alone: Sequence[Segment]) -> Sequences | None:
        following = [segment for segment in self._segments if segment.prefix is not None]
        if not following:
            return None
        prefixes = [segment.prefix for segment in following if segment.prefix is not None]
        in_order = prefixes == sorted(prefixes) and self._segments == (*alone, *following)
        assert in_order, "completions do not stand behind all prompts, and in their order"
        asking = [0] * len(alone)
        for segment, prefix in zip(following, prefixes, strict=True):
            asking[prefix] += segment.length
        return Sequences.of(asking, [segment.length for segment in alone], self._device)

    @cached_property
    def joined(self) -> tuple[Tensor, Sequences]:
        """For windows: packed positions of all keys, each completion's prompt before it; and these sequences."""
        positions: list[Tensor] = []
        keys: list[int] = []
        for segment in self._segments:
            seen = [segment] if segment.prefix is None else [self._segments[segment.prefix], segment]
            positions += [torch.arange(one.start, one.stop) for one in seen]
            keys.append(sum(one.length for one in seen))
        queries = [segment.length for segment in self._segments]
        return torch.cat(positions).to(self._device), Sequences.of(queries, keys, self._device)


def varlen_attention(query: Tensor, key: Tensor, value: Tensor, plan: VarlenPlan, call: AttentionCall) -> Tensor:
    """`[N, Hq, d]` from queries `[N, Hq, d]`, keys and values `[N, Hkv, d]`; padding rows come out zero."""
    return _Attention.apply(query, key, value, plan, call)


@dataclass(frozen=True, slots=True)
class _Flash:
    """Flash attention over some sequences."""

    sequences: Sequences
    scale: float
    causal: bool
    window: int | None = None

    @property
    def _settings(self) -> dict[str, Any]:
        left, right = (-1, -1) if self.window is None else (self.window - 1, 0)
        return {"scale": self.scale, "window_size_left": left, "window_size_right": right}

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The result, and `[Hq, N]`, float32, the log of each row's sum of exponentials."""
        some = self.sequences
        # The kernel takes fewer key heads than query heads.
        out, log_mass, *_ = torch.ops.aten._flash_attention_forward(
            query, key, value, some.queries, some.keys, some.longest_query, some.longest_key, 0.0, self.causal, False,
            **self._settings,
        )  # fmt: skip
        return out, log_mass

    def backward(self, grad: Tensor, kept: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of queries, keys and values.

        Args:
            kept: queries, keys, values, and of the whole rows, result and log-sum.
        """
        query, key, value, out, log_mass = kept
        some = self.sequences
        no_dropout = torch.zeros(2, dtype=torch.uint64, device=query.device), torch.empty(0, device=query.device)
        with _in_fixed_order():
            return torch.ops.aten._flash_attention_backward(
                grad, query, key, value, out, log_mass, some.queries, some.keys, some.longest_query, some.longest_key,
                0.0, self.causal, *no_dropout, **self._settings,
            )  # fmt: skip


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, plan: VarlenPlan, call: AttentionCall) -> Tensor:
        out = torch.zeros_like(query)
        asking = query[: plan.num_queries]
        if call.window is not None:
            positions, sequences = plan.joined
            flash = _Flash(sequences, call.scale, causal=True, window=call.window)
            found, log_mass = flash.forward(asking, key[positions], value[positions])
        else:
            used = slice(plan.num_queries)
            found, log_mass = _Flash(plan.own, call.scale, causal=True).forward(asking, key[used], value[used])
            if plan.prompts is not None:
                _put_together(found, log_mass, *_before_prompts(plan, call, query, key, value), plan.rows)
        out[: plan.num_queries] = found
        ctx.save_for_backward(query, key, value, out, log_mass)
        ctx.plan, ctx.call = plan, call
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        found = flash_gradients(ctx.saved_tensors, grads[0], ctx.plan, ctx.call)
        return *found, None, None


def _before_prompts(
    plan: VarlenPlan, call: AttentionCall, query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor]:
    assert plan.prompts is not None
    rows, seen = slice(plan.rows, plan.num_queries), slice(plan.num_keys)
    return _Flash(plan.prompts, call.scale, causal=False).forward(query[rows], key[seen], value[seen])


def _put_together(out: Tensor, log_mass: Tensor, other: Tensor, other_mass: Tensor, rows: int) -> None:
    """Write over the rows from `rows` on the results of both parts of their keys."""
    whole = torch.logaddexp(log_mass[:, rows:], other_mass)
    share, other_share = (
        (part - whole).exp_().t()[..., None] for part in (log_mass[:, rows:], other_mass)
    )  # of each part in the row's sum, `[rows, Hq, 1]`
    out[rows:] = out[rows:] * share + other * other_share
    log_mass[:, rows:] = whole


def flash_gradients(
    kept: Sequence[Tensor], grad: Tensor, plan: VarlenPlan, call: AttentionCall
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `query [N, Hq, d]`, `key, value [N, Hkv, d]` by flash attention, whoever computed the result.

    Args:
        kept: queries, keys, values, result `[N, Hq, d]`, and the log of each row's sum of exponentials `[Hq, N]`,
            which may leave padding out.
        grad: of the result.
    """
    query, key, value, out, log_mass = kept
    used = slice(plan.num_queries)
    of_query, of_key, of_value = (torch.zeros_like(x) for x in (query, key, value))
    if call.window is not None:
        positions, sequences = plan.joined
        flash = _Flash(sequences, call.scale, causal=True, window=call.window)
        rows = query[used], key[positions], value[positions], out[used], log_mass[:, used].contiguous()
        of_query[used], joined_key, joined_value = flash.backward(grad[used].contiguous(), rows)
        with _in_fixed_order():
            of_key.index_put_((positions,), joined_key, accumulate=True)
            of_value.index_put_((positions,), joined_value, accumulate=True)
        return of_query, of_key, of_value
    own = query[used], key[used], value[used], out[used], log_mass[:, used].contiguous()
    flash = _Flash(plan.own, call.scale, causal=True)
    of_query[used], of_key[used], of_value[used] = flash.backward(grad[used].contiguous(), own)
    if plan.prompts is not None:
        rows, seen = slice(plan.rows, plan.num_queries), slice(plan.num_keys)
        shared = query[rows], key[seen], value[seen], out[rows], log_mass[:, rows].contiguous()
        flash = _Flash(plan.prompts, call.scale, causal=False)
        more = flash.backward(grad[rows].contiguous(), shared)
        of_query[rows] += more[0]
        of_key[seen] += more[1]
        of_value[seen] += more[2]
    return of_query, of_key, of_value


@contextmanager
def _in_fixed_order() -> Generator[None, None, None]:
    """Sums of a backward pass that repeat to the bit: flash attention adds the queries' gradients in any order unless
    torch is told, and it can only be told for the whole process. Nothing samples while a policy learns."""
    asked = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    deterministic: Any = torch.utils.deterministic
    fills = deterministic.fill_uninitialized_memory
    deterministic.fill_uninitialized_memory = False
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(asked[0], warn_only=asked[1])
        deterministic.fill_uninitialized_memory = fills
