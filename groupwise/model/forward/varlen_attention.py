"""The GPU form of packed attention: one call of torch's variable-length flash attention per layer.

Every segment is one sequence of queries. Its keys are its prefix's, then its own; causal masks of unequal lengths align
at the end, which is what a completion after its prompt needs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from inspect import signature

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from groupwise.model.forward.attention import AttentionCall
from groupwise.model.forward.packing import Packed

_TAKES_GQA = "enable_gqa" in signature(varlen_attn).parameters


@dataclass(frozen=True, slots=True)
class VarlenPlan:
    """`keys [K]`: packed positions of all keys, by sequence; cumulative lengths `[S + 1]` int32; longest lengths."""

    num_queries: int
    keys: Tensor
    cumulative_queries: Tensor
    cumulative_keys: Tensor
    longest_query: int
    longest_key: int


def make_varlen_plan(packed: Packed) -> VarlenPlan:
    """Cut the packed sequence into flash attention's sequences."""
    device = packed.token_ids.device
    keys: list[Tensor] = []
    for segment in packed.segments:
        if segment.prefix is not None:
            prefix = packed.segments[segment.prefix]
            keys.append(torch.arange(prefix.start, prefix.stop))
        keys.append(torch.arange(segment.start, segment.stop))
    query_lengths = [segment.length for segment in packed.segments]
    key_lengths = [
        segment.length + (packed.segments[segment.prefix].length if segment.prefix is not None else 0)
        for segment in packed.segments
    ]
    return VarlenPlan(
        num_queries=sum(query_lengths),
        keys=torch.cat(keys).to(device),
        cumulative_queries=_cumulative(query_lengths, device),
        cumulative_keys=_cumulative(key_lengths, device),
        longest_query=max(query_lengths),
        longest_key=max(key_lengths),
    )


def _cumulative(lengths: list[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(device=device, dtype=torch.int32)


def varlen_attention(query: Tensor, key: Tensor, value: Tensor, plan: VarlenPlan, call: AttentionCall) -> Tensor:
    """`[N, Hq, d]` from queries `[N, Hq, d]`, keys and values `[N, Hkv, d]`; padding rows come out zero."""
    window = (-1, 0) if call.window is None else (call.window - 1, 0)
    # The kernel behind takes fewer key heads than query heads; newer torch wants that said, torch 2.11 has no word for
    # it.
    attend = partial(varlen_attn, enable_gqa=True) if _TAKES_GQA else varlen_attn
    out = attend(
        query[: plan.num_queries],
        key[plan.keys],
        value[plan.keys],
        plan.cumulative_queries,
        plan.cumulative_keys,
        plan.longest_query,
        plan.longest_key,
        scale=call.scale,
        window_size=window,
    )
    assert isinstance(out, Tensor)
    missing = query.shape[0] - plan.num_queries
    return torch.cat([out, out.new_zeros(missing, *out.shape[1:])]) if missing else out
