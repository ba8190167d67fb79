"""Learning-rate schedules: pure functions of the number of updates made."""

from __future__ import annotations

import math

from groupwise.config import OptimConfig


def learning_rate(config: OptimConfig, update: int, total_updates: int) -> float:
    """The rate of update number `update` (from 0) of `total_updates`.

    It rises linearly to `lr` over the first `warmup_ratio` of all updates, or the first `warmup_steps`, then stays, or
    falls to `min_lr_ratio * lr` at the last update: in a line, or along half a cosine (Loshchilov & Hutter 2017,
    equation 5, without restarts).

    Update u of a warm-up of W has the rate lr·(u + 1)/W, so every update learns. transformers' `get_scheduler` has
    lr·u/W: its first update has the rate 0, and each one of the warm-up the rate of the one before it here. After the
    warm-up both are the same.
    """
    warmup = config.warmup_steps or math.ceil(config.warmup_ratio * total_updates)
    if update < warmup:
        return config.lr * (update + 1) / warmup
    if config.schedule == "constant":
        return config.lr
    progress = min(1.0, (update - warmup) / max(1, total_updates - warmup))
    left = 1.0 - progress if config.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.lr * (config.min_lr_ratio + (1.0 - config.min_lr_ratio) * left)
