"""On-policy RL with the optimal baseline."""

from __future__ import annotations

from torch import Tensor

from groupwise.algorithms.advantages.shared import by_group
from groupwise.algorithms.base import AdvantageInputs


def opo(inputs: AdvantageInputs) -> tuple[Tensor, ...]:
    """A_i = r_i - Σ_j l_j·r_j / Σ_j l_j, l the lengths in tokens (arXiv:2505.23585).

    The baseline of least variance when a completion's squared gradient norm grows with its length. It is the
    length-weighted sum of a group's advantages that is 0, not the plain one.
    """
    return by_group(inputs, _length_weighted)


def _length_weighted(rewards: Tensor, lengths: Tensor) -> Tensor:
    total = lengths.sum()
    baseline = (lengths * rewards).sum() / total if total > 0 else rewards.mean()
    return rewards - baseline
