"""Group-relative advantages, with or without division by a spread."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from groupwise.algorithms.advantages.shared import EPSILON, all_equal, by_group, over_batch, standardised
from groupwise.algorithms.base import AdvantageInputs


def grpo(inputs: AdvantageInputs, *, scale: Literal["group", "batch", "none"]) -> tuple[Tensor, ...]:
    """A_i = (r_i - mean of the group) / (s + 1e-4), s the unbiased std of the group or batch; `none` does not divide.

    `group` is GRPO (arXiv:2402.03300, section 4.1.2), `none` is Dr. GRPO (arXiv:2503.20783, section 3.2).
    """
    if scale == "group":
        return by_group(inputs, lambda rewards, _: standardised(rewards))
    if scale == "none":
        return by_group(inputs, lambda rewards, _: rewards - rewards.mean())
    batch = over_batch(inputs)
    if all_equal(batch):
        return by_group(inputs, lambda rewards, _: rewards.new_zeros(rewards.shape))
    spread = batch.std() + EPSILON
    return by_group(inputs, lambda rewards, _: (rewards - rewards.mean()) / spread)
