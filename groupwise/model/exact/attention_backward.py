"""The backward pass of the exact attention on a CPU: torch's flash kernel, segment by segment.

Its forward is not used, since its bits depend on the number of rows. The backward recomputes the weights of a segment
from the row's log-sum-exp over all its segments (Dao 2023, "FlashAttention-2", algorithm 2), so each segment gives its
own share of the gradients, and nothing of size tokens x tokens outlives the call.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from groupwise.model.forward.attention import AttentionCall

NO_WEIGHT = 1e30  # a row with this log-sum-exp weighs every key zero


@dataclass(frozen=True, slots=True)
class Rows:
    """Query rows: `query, grad, out [n, R, Hq, d]`, `log_mass [n, R, Hq]`, `distance [R]` from the first key's place
    to each row's."""

    query: Tensor
    grad: Tensor
    out: Tensor
    log_mass: Tensor
    distance: Tensor


@dataclass(frozen=True, slots=True)
class Grads:
    """Of one segment: `query [n, R, Hq, d]`; `key, value [n, T, Hkv, d]`."""

    query: Tensor
    key: Tensor
    value: Tensor


def attention_backward(rows: Rows, key: Tensor, value: Tensor, call: AttentionCall, *, causal: bool) -> Grads:
    """Gradients of one key segment `[n, T, Hkv, d]`.

    Args:
        causal: row r is token r of the segment, and sees the keys up to itself; else all rows see all keys, as far as
            the window reaches.
    """
    repeat = rows.query.shape[2] // key.shape[2]
    mask = None if call.window is None else _mask(rows.distance, key, call.window, causal=causal)
    grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        rows.grad.transpose(1, 2),
        rows.query.transpose(1, 2),
        _by_query_head(key, repeat),
        _by_query_head(value, repeat),
        rows.out.transpose(1, 2),
        rows.log_mass.transpose(1, 2),
        0.0,
        causal and mask is None,
        attn_mask=mask,
        scale=call.scale,
    )
    of_query, of_key, of_value = (grad.transpose(1, 2) for grad in grads)
    return Grads(of_query, _by_key_head(of_key, repeat), _by_key_head(of_value, repeat))


def _by_query_head(x: Tensor, repeat: int) -> Tensor:
    return (x.repeat_interleave(repeat, 2) if repeat > 1 else x).transpose(1, 2)


def _by_key_head(x: Tensor, repeat: int) -> Tensor:
    return x.unflatten(2, (-1, repeat)).sum(3) if repeat > 1 else x


def _mask(distance: Tensor, key: Tensor, window: int, *, causal: bool) -> Tensor:
    """`[1, 1, R, T]`, to be added to the scores."""
    ahead = distance[:, None] - torch.arange(key.shape[1])
    hidden = ahead >= window
    if causal:
        hidden |= ahead < 0
    return torch.zeros(hidden.shape, dtype=key.dtype).masked_fill_(hidden, -torch.inf)[None, None]
