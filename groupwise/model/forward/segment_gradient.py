"""The backward pass of attention on any device, segment by segment, from each row's log-sum-exp.

Dao 2023, "FlashAttention-2", algorithm 2, with torch's products in place of a kernel: weights are computed again, for
some rows at a time. Only forward passes must agree bit for bit, so nothing here is in a fixed order; it is
deterministic as far as torch's matrix products are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from groupwise.model.exact.attention_backward import Grads, Rows
from groupwise.model.exact.blocks import wide, wide_bmm, widens
from groupwise.model.forward.attention import AttentionCall

_MAX_SCORES = 1 << 26  # scores that exist at one time: 256 MiB in float32


def segment_gradient(rows: Rows, key: Tensor, value: Tensor, call: AttentionCall, *, causal: bool) -> Grads:
    """Gradients of one key segment `[n, T, Hkv, d]`; arguments as for `attention_backward`."""
    heads = key.shape[2]
    keys, values = key.transpose(1, 2), value.transpose(1, 2)  # [n, Hkv, T, d]
    of_key, of_value = (torch.zeros_like(keys, dtype=wide(key[:0]).dtype) for _ in range(2))
    of_query: list[Tensor] = []
    step = max(1, _MAX_SCORES // (rows.query.shape[0] * rows.query.shape[2] * key.shape[1]))
    for first in range(0, rows.query.shape[1], step):
        part = slice(first, first + step)
        query, grad = _by_key_head(rows.query[:, part], heads), _by_key_head(rows.grad[:, part], heads)
        out, log_mass = _by_key_head(rows.out[:, part], heads), _by_key_head(rows.log_mass[:, part, :, None], heads)
        hidden = _hidden(rows.distance[part], key.shape[1], call.window, causal=causal)
        scores = _product(query, keys.transpose(2, 3)).mul_(call.scale)
        if hidden is not None:
            scores.masked_fill_(hidden.repeat_interleave(query.shape[2] // hidden.shape[0], 0), -torch.inf)
        weights = scores.sub_(log_mass).exp_()
        of_value += _product(weights.to(grad.dtype).transpose(2, 3), grad)
        along = (wide(grad) * wide(out)).sum(-1, keepdim=True)
        of_scores = _product(grad, values.transpose(2, 3)).sub_(along).mul_(weights).mul_(call.scale).to(query.dtype)
        of_query.append(_by_token(_product(of_scores, keys), rows.query.shape[2] // heads))
        of_key += _product(of_scores.transpose(2, 3), query)
    return Grads(torch.cat(of_query, 1), of_key.transpose(1, 2), of_value.transpose(1, 2))


def _product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` of `[n, H, …, …]`, float32: weights are exponentials of scores, so a score's rounding costs most."""
    if widens(a.dtype, a.device):
        return wide_bmm(a.flatten(0, 1), b.flatten(0, 1)).unflatten(0, a.shape[:2])
    return wide(a) @ wide(b)


def _by_key_head(x: Tensor, heads: int) -> Tensor:
    """`[n, R, Hq, …]` as `[n, Hkv, R * repeat, …]`."""
    return x.unflatten(2, (heads, -1)).transpose(1, 2).flatten(2, 3)


def _by_token(x: Tensor, repeat: int) -> Tensor:
    """The inverse of `_by_key_head`."""
    return x.unflatten(2, (-1, repeat)).transpose(1, 2).flatten(2, 3)


def _hidden(distance: Tensor, keys: int, window: int | None, *, causal: bool) -> Tensor | None:
    """`[R, T]`: keys that a row does not see; None if all are seen."""
    ahead = distance[:, None] - torch.arange(keys, device=distance.device)
    if window is None:
        return ahead < 0 if causal else None
    return (ahead >= window) | (ahead < 0) if causal else ahead >= window
