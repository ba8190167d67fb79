"""Log-probs that the algorithm asks for before it can learn from a step's groups: the policy's own, the reference's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from torch import Tensor

from groupwise.policy import Policy
from groupwise.rollout.batch import is_learnable
from groupwise.rollout.microbatches import split_rows
from groupwise.types import REFERENCE, Rollout, RolloutGroup, TrainingRow

Forward: TypeAlias = Callable[[Sequence[Sequence[TrainingRow]]], Sequence[Tensor]]


@dataclass(frozen=True, slots=True)
class LogprobPass:
    """One forward without gradient over a step's rollouts, for each kind that is wanted; none for what is not.

    Attributes:
        old: the policy's, as it is before the step's first update.
        reference: the reference's, for a KL in the reward.

    Example:
        groups = LogprobPass(policy, old=True, reference=False, micro_batch_tokens=16_384).add(groups)
    """

    policy: Policy
    old: bool
    reference: bool
    micro_batch_tokens: int

    def add(self, groups: Sequence[RolloutGroup]) -> tuple[RolloutGroup, ...]:
        """The groups, with `old_logprobs` and the reference's scores in every rollout that can be learned from."""
        if not (self.old or self.reference):
            return tuple(groups)
        rows = {
            (group.index, rollout.sample_index): _row(group, rollout)
            for group in groups
            for rollout in group.rollouts
            if is_learnable(rollout)
        }
        old = self._compute(self._old, list(rows.values())) if self.old else {}
        reference = self._compute(self.policy.reference_log_probs, list(rows.values())) if self.reference else {}

        def filled(group: RolloutGroup, rollout: Rollout) -> Rollout:
            row = rows.get((group.index, rollout.sample_index))
            return (
                rollout
                if row is None
                else replace(rollout, old_logprobs=old.get(row), scores=_named(reference.get(row)))
            )

        return tuple(replace(group, rollouts=tuple(filled(group, r) for r in group.rollouts)) for group in groups)

    def _old(self, batches: Sequence[Sequence[TrainingRow]]) -> list[Tensor]:
        return list(self.policy.lanes.map(self.policy.log_probs, batches))

    def _compute(self, forward: Forward, rows: Sequence[TrainingRow]) -> dict[TrainingRow, tuple[float, ...]]:
        """By row: equal rows have equal log-probs."""
        found: dict[TrainingRow, tuple[float, ...]] = {}
        batches = [part.rows for part in split_rows(rows, self.micro_batch_tokens, lanes=self.policy.lanes.count)]
        for batch, logprobs in zip(batches, forward(batches), strict=True):
            values = iter(logprobs.tolist())
            found.update({row: tuple(next(values) for _ in row.token_ids) for row in batch})
        return found


def _named(reference: tuple[float, ...] | None) -> dict[str, tuple[float, ...]]:
    return {} if reference is None else {REFERENCE: reference}


def _row(group: RolloutGroup, rollout: Rollout) -> TrainingRow:
    return TrainingRow(
        group=group.index,
        prompt=rollout.prompt or group.prompt.input,
        follows=rollout.input,
        loss_mask=rollout.loss_mask,
        advantages=(0.0,) * len(rollout.token_ids),
        logprobs=rollout.logprobs,
    )
