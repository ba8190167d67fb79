"""Completions that ran into the length limit: a soft penalty on the reward, or no loss at all."""

from __future__ import annotations

import torch
from torch import Tensor


def soft_overlong_penalty(lengths: Tensor, *, max_tokens: int, buffer_tokens: int) -> Tensor:
    """`[G]` penalties to add to rewards: 0 up to `max_tokens - buffer_tokens`, then linear, -1 from `max_tokens` on.

    DAPO, equation 13 (arXiv:2503.14476).

    Args:
        lengths: `[G]`, tokens.
    """
    assert 0 < buffer_tokens <= max_tokens, f"overlong buffer of {buffer_tokens} tokens does not fit into {max_tokens}"
    start = max_tokens - buffer_tokens
    return ((start - lengths.double()) / buffer_tokens).clamp(-1, 0)


def truncated_mask(mask: Tensor, row: Tensor, *, truncated: Tensor) -> Tensor:
    """`[N]` the loss mask without the rows marked in `truncated [R]` (bool): DAPO's overlong filtering, section 3.4.

    Count denominators after it: a filtered row is not part of the batch.
    """
    return torch.where(truncated[row], torch.zeros_like(mask), mask)
