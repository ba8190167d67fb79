"""The length penalty of DAPO."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from groupwise.errors import ConfigError
from groupwise.rewards.arguments import positive_count


def overlong_reward(*, max_tokens: int, buffer_tokens: int) -> Callable[..., list[float | None]]:
    """Make the soft overlong punishment of DAPO (arXiv 2503.14476, eq. 13), between -1 and 0.

    With L = `max_tokens` and B = `buffer_tokens`, a completion of n tokens gets 0 up to L - B, then falls linearly,
    `(L - B - n) / B`, to -1 at L and beyond.

    Args:
        max_tokens: where the penalty is full; usually rollout.max_completion_tokens.
        buffer_tokens: the length of the slope.

    Raises:
        ConfigError: an argument is wrong.
    """
    longest = positive_count(max_tokens, reward="overlong", name="max_tokens")
    buffer = positive_count(buffer_tokens, reward="overlong", name="buffer_tokens")
    if buffer > longest:
        raise ConfigError(f"reward 'overlong': buffer_tokens = {buffer} is more than max_tokens = {longest}; lower it")

    def overlong(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float | None]:
        return [max(-1.0, min(0.0, (longest - buffer - len(ids)) / buffer)) for ids in completion_ids]

    return overlong
