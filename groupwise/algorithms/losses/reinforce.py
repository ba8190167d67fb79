"""The plain policy gradient."""

from __future__ import annotations

from groupwise.algorithms.base import LossInputs, TokenLoss


def reinforce(inputs: LossInputs) -> TokenLoss:
    """l_t = -A_t·log π(o_t) (Williams 1992). Exact on policy, which is the first of `steps_per_batch` steps."""
    return TokenLoss(-inputs.advantages * inputs.logprobs)
