"""What the loop learns from where samples are drawn: groups, selected, with the log-probs that algorithms ask for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from groupwise.algorithms import Algorithm
from groupwise.batches import TrainingBatch
from groupwise.clock import Clock
from groupwise.empty_steps import Usable
from groupwise.metrics import Metrics, merge
from groupwise.rewards import RewardScorer
from groupwise.rollout.batch import BatchShape, build_batch, usable_samples
from groupwise.rollout.buffer import Buffer
from groupwise.rollout.logprobs import LogprobPass
from groupwise.rollout.producer import Producer
from groupwise.rollout.prompt_routes import with_one_choice
from groupwise.rollout.selection import Selection


@dataclass(frozen=True, slots=True)
class GroupSource:
    """Batches of sampled groups; a `BatchSource` of the loop."""

    algorithm: Algorithm
    producer: Producer
    buffer: Buffer
    selection: Selection
    logprobs: LogprobPass
    scorer: RewardScorer
    shape: BatchShape
    reward_weights: Mapping[str, float]

    def admit(self, version: int) -> None:
        """Sample what may be sampled now that `version` is the newest."""
        self.producer.admit(version)

    async def take(self, step: int, clock: Clock) -> TrainingBatch:
        """The batch of `step` (from 0)."""
        with clock("rollout"):
            chosen = await self.selection.take(step)
        with clock("train"):
            one_choice, found = with_one_choice(chosen.groups)
            groups = await self.logprobs.add(one_choice)
        batch = build_batch(
            groups,
            self.algorithm,
            shape=self.shape,
            reward_weights=dict(self.reward_weights),
            dropped=chosen.dropped,
        )
        return replace(batch, metrics=merge(chosen.metrics, batch.metrics, found))

    def usable(self, batch: TrainingBatch) -> Usable:
        """How much of it could be learned from."""
        return usable_samples((*batch.groups, *batch.dropped), self.algorithm)

    def metrics(self) -> Metrics:
        """Of rewards and buffer, since the last call."""
        return merge(self.scorer.metrics(), self.buffer.metrics())

    def note(self, numbers: Mapping[str, float]) -> None:
        """The step's numbers, which change nothing here."""

    def resumed(self) -> None:
        """Sample again what waited."""
        self.producer.rewind(self.buffer.next_index)

    async def close(self) -> None:
        await self.producer.close()
