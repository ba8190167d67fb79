"""Advantages, policy losses, KL and corrections as pure tensor functions, composed by name.

Example:
    >>> from groupwise.config import AlgorithmConfig
    >>> build_algorithm(AlgorithmConfig(name="dr_grpo")).normaliser
    'constant'
"""

from __future__ import annotations

from groupwise.algorithms.base import AdvantageInputs, Algorithm, LossInputs, LossOutput, TokenLoss
from groupwise.algorithms.registry import build_algorithm, describe_algorithms

__all__ = [
    "AdvantageInputs",
    "Algorithm",
    "LossInputs",
    "LossOutput",
    "TokenLoss",
    "build_algorithm",
    "describe_algorithms",
]
