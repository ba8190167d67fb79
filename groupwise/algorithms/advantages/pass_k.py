"""Pass@k training: the reward of the best of k, with every subset of k counted exactly."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from groupwise.algorithms.advantages.shared import by_group
from groupwise.algorithms.base import AdvantageInputs


def pass_k(inputs: AdvantageInputs, *, k: int, threshold: float) -> tuple[Tensor, ...]:
    """Advantages of the pass@k reward over all subsets of `k` of a group's N rollouts, of which M are wrong.

    With R = 1 - C(M, k) / C(N, k) and s = sqrt(R·(1 - R)): right answers get (1 - R) / s, wrong ones
    (1 - R - C(M - 1, k - 1) / C(N - 1, k - 1)) / s (arXiv:2508.10751, analytical derivation).
    Exactly 0 where s is: none right, or so many that every subset has one. A reward above `threshold` is right.
    """
    return by_group(inputs, lambda rewards, _: _best_of_subsets(rewards > threshold, k))


def _best_of_subsets(right: Tensor, k: int) -> Tensor:
    count, wrong = right.shape[0], int((~right).sum())
    k = min(k, count)
    failed = math.comb(wrong, k) / math.comb(count, k)
    if failed in (0.0, 1.0):
        return torch.zeros(count, dtype=torch.float64)
    spread = math.sqrt(failed * (1 - failed))
    wrong_beside_wrong = math.comb(wrong - 1, k - 1) / math.comb(count - 1, k - 1)
    advantages = torch.full((count,), (failed - wrong_beside_wrong) / spread, dtype=torch.float64)
    advantages[right] = failed / spread
    return advantages
