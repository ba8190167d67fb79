"""On-policy distillation as credit per token: the sampled tokens' reverse KL to a teacher."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class TeacherCredit:
    """A_t += c·(log q(y_t) - log π_old(y_t)), with q the teacher.

    With A_t held fixed, its expected policy gradient is that of -Σ_t KL(π(·|s_t) ‖ q(·|s_t)) at fixed states (MiniLLM,
    arXiv:2306.08543, eq. 4 without its long-term part; Lu et al., On-Policy Distillation, 2025). Neither whitened nor
    centred: it is in nats, and its mean is -c·KL.

    Attributes:
        coef: c.
        clamp: nats at which the difference is cut; None cuts nothing.
    """

    coef: float = 1.0
    clamp: float | None = None

    def of(self, teacher: Tensor, old: Tensor, mask: Tensor) -> Tensor:
        """`[T]` float64, 0 where `mask` is; `teacher` and `old` are log-probs `[T]` at the sampling temperature."""
        return torch.where(mask > 0, self.coef * self._cut(teacher.double() - old.double()), 0.0)

    def is_cut(self, teacher: Tensor, old: Tensor) -> Tensor:
        """`[T]` bool: the clamp acts."""
        difference = teacher.double() - old.double()
        return self._cut(difference) != difference

    def _cut(self, difference: Tensor) -> Tensor:
        return difference if self.clamp is None else difference.clamp(-self.clamp, self.clamp)
