"""Supervised training as a source of batches for the one loop: the loss is on the assistant's tokens only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from groupwise.algorithms.base import LossInputs, LossOutput, with_balance
from groupwise.batches import Denominators, Knobs, MiniBatch, TrainingBatch, TrainingRow
from groupwise.clock import Clock
from groupwise.config import Config
from groupwise.data.sampler import epoch_order
from groupwise.empty_steps import Usable
from groupwise.metrics import Last, Metrics


@dataclass(frozen=True, slots=True)
class SupervisedLoss:
    """Mean negative log-likelihood over the learned tokens of the whole optimiser batch."""

    needs_reference: bool = False
    needs_entropy: bool = False
    router_aux_loss_coef: float = 0.0

    def turned(self, knobs: Knobs) -> SupervisedLoss:
        """No number of it changes."""
        return self

    def loss(self, inputs: LossInputs) -> LossOutput:
        output = LossOutput(-(inputs.logprobs * inputs.mask).sum() / max(inputs.denominators.tokens, 1.0), {})
        coef = self.router_aux_loss_coef
        return with_balance(output, inputs, coef) if coef > 0 else output


class SupervisedSource:
    """Batches of worked answers; a `BatchSource` of the loop. Its state is the last step's loss, for the summary.

    Args:
        rows: of the data; every epoch has each once, in an order of its own.
    """

    def __init__(self, rows: Sequence[TrainingRow], config: Config) -> None:
        self._rows = rows
        self._config = config
        self.loss: float | None = None

    def admit(self, version: int) -> None:
        """Nothing has to begin."""

    async def take(self, step: int, clock: Clock) -> TrainingBatch:
        """The rows of `step` (from 0), as one optimiser step."""
        rows = self._rows_of(step)
        tokens = float(sum(sum(row.loss_mask) for row in rows))
        denominators = Denominators(tokens, float(len(rows)), float(self._config.sft.max_tokens))
        return TrainingBatch((), (), (MiniBatch(tuple(rows), denominators),), {"num_tokens": Last(tokens)})

    def usable(self, batch: TrainingBatch) -> Usable:
        """Its learned tokens."""
        rows = [row for minibatch in batch.minibatches for row in minibatch.rows]
        tokens = sum(sum(row.loss_mask) for row in rows)
        return Usable(tokens, ("the row has no token to learn",) * len(rows))

    def metrics(self) -> Metrics:
        """None beside the batch's."""
        return {}

    def note(self, numbers: Mapping[str, float]) -> None:
        """Keep the loss."""
        self.loss = numbers["loss"]

    def resumed(self) -> None:
        """The step says which rows come."""

    async def close(self) -> None:
        """Nothing is under way."""

    def _rows_of(self, step: int) -> list[TrainingRow]:
        size, count = self._config.sft.rows_per_step, len(self._rows)
        seed, shuffle = self._config.train.seed, self._config.data.shuffle
        chosen: list[TrainingRow] = []
        for k in range(step * size, (step + 1) * size):
            epoch, place = divmod(k, count)
            order = epoch_order(count, seed=seed, epoch=epoch) if shuffle else None
            chosen.append(self._rows[place if order is None else int(order[place])])
        return chosen

    def state_dict(self) -> dict[str, Any]:
        return {"loss": self.loss}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loss = state["loss"]
