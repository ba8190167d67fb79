"""What each rollout is credited with: an outcome, and token terms beside it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from groupwise.algorithms.base import Algorithm
from groupwise.batches import Credit
from groupwise.metrics import Mean, Metric
from groupwise.tensors import floats
from groupwise.types import TEACHER, Rollout, RolloutGroup


def add_token_terms(
    groups: Sequence[RolloutGroup], outcomes: Sequence[Sequence[float]], algorithm: Algorithm
) -> tuple[tuple[Credit, ...], ...]:
    """`[groups][G]`: the outcome alone where there are no token terms, else their sum `[T]`."""
    return tuple(
        tuple(_credit(rollout, outcome, algorithm) for rollout, outcome in zip(group.rollouts, given, strict=True))
        for group, given in zip(groups, outcomes, strict=True)
    )


def _credit(rollout: Rollout, outcome: float, algorithm: Algorithm) -> Credit:
    if algorithm.teacher is None or TEACHER not in rollout.scores:
        return outcome
    term = algorithm.teacher.of(*_compared(rollout), torch.tensor(rollout.loss_mask))
    return tuple(floats(term + outcome))


def _compared(rollout: Rollout) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs `[T]` of the teacher, and of the policy that sampled."""
    old = rollout.logprobs if rollout.old_logprobs is None else rollout.old_logprobs
    return torch.tensor(rollout.scores[TEACHER], dtype=torch.float64), torch.tensor(old, dtype=torch.float64)


def credit_metrics(groups: Sequence[RolloutGroup], algorithm: Algorithm) -> dict[str, Metric]:
    """The teacher's term over written tokens: its mean, which is -coef times the KL in nats, by data source too where
    there are several; its standard deviation; the share of tokens that the clamp cuts."""
    term = algorithm.teacher
    if term is None:
        return {}
    values: dict[str, list[float]] = {}
    cut = 0.0
    for group in groups:
        for rollout in (rollout for rollout in group.rollouts if TEACHER in rollout.scores):
            written = torch.tensor(rollout.loss_mask) > 0
            teacher, old = _compared(rollout)
            found = floats(term.of(teacher, old, written.long())[written])
            values.setdefault(group.prompt.data_source, []).extend(found)
            cut += float((term.is_cut(teacher, old) & written).sum())
    every = [value for some in values.values() for value in some]
    if not every:
        return {}
    mean = math.fsum(every) / len(every)
    metrics: dict[str, Metric] = {"credit/teacher_mean": Mean(math.fsum(every), len(every))}
    spread = math.sqrt(math.fsum((value - mean) ** 2 for value in every) / len(every))
    metrics["credit/teacher_std"] = Mean(spread, 1.0)
    if len(values) > 1:
        for source, some in values.items():
            metrics[f"credit/teacher_mean/{source}"] = Mean(math.fsum(some), len(some))
    if term.clamp is not None:
        metrics["credit/teacher_clamped"] = Mean(cut, len(every))
    return metrics
