"""The policy of one process: cuts batches to its memory, and learns in a thread of its own.

The event loop stays free meanwhile, so that engines in other processes are answered. All that touches the weights runs
in that thread, one thing after another.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from groupwise.batches import Knobs, MiniBatch, ScoreRequest, TrainingRow
from groupwise.errors import ConfigError
from groupwise.metrics import Metrics
from groupwise.model.forward.packing import pack
from groupwise.model.saved_weights import saved_weights
from groupwise.policy.learner import Learner
from groupwise.policy.microbatches import cut_batch, split_rows
from groupwise.policy.reference import FrozenScorer, Reference
from groupwise.policy.saving import write_model
from groupwise.policy.worker import Worker
from groupwise.tensors import floats
from groupwise.types import REFERENCE

POLICY = "policy"
"""The policy's own name, among scorers."""


class LocalPolicy:
    """Implements `groupwise.protocols.Policy` over one module.

    Args:
        micro_batch_tokens: most tokens of one forward and backward pass.
        scorers: by name, beside the learner's own `reference`.

    Example:
        policy = LocalPolicy(learner, micro_batch_tokens=16_384)
        metrics = await policy.learn(minibatch, Knobs())
        metrics.append(await policy.optim_step())
    """

    def __init__(
        self, learner: Learner, *, micro_batch_tokens: int, scorers: Mapping[str, FrozenScorer] | None = None
    ) -> None:
        self._learner = learner
        self._budget = micro_batch_tokens
        self._scorers: dict[str, FrozenScorer] = dict(scorers or {})
        if learner.reference is not None:
            self._scorers[REFERENCE] = learner.reference
        self._worker = Worker("policy")

    @property
    def bytes_to_come(self) -> int:
        """Memory that training will take beside activations, and has not taken yet."""
        return self._learner.bytes_to_come

    @property
    def reference(self) -> Reference | None:
        """The scorer of that name, if it can follow."""
        return self._learner.reference

    async def learn(self, batch: MiniBatch, knobs: Knobs) -> list[Metrics]:
        """Add the gradient of the batch; metrics of each micro-batch.

        Cancelled, it ends at the next micro-batch; then, as after any error, the update has no gradient yet.
        """
        stopped = threading.Event()
        return await self._worker.run(partial(self._learn, batch, knobs, stopped), stopped=stopped)

    def _learn(self, batch: MiniBatch, knobs: Knobs, stopped: threading.Event) -> list[Metrics]:
        parts = cut_batch(batch, self._budget, streams=self._learner.streams.count)
        return self._learner.learn(parts, batch.denominators, knobs, stopped=stopped.is_set)

    async def optim_step(self) -> Metrics:
        """Clip, update, forget the gradients.

        Raises:
            TrainingError: the third non-finite gradient in a row.
        """
        return await self._worker.run(self._learner.optim_step)

    async def log_probs(
        self, requests: Sequence[ScoreRequest], *, of: str = POLICY, temperature: float | None = None
    ) -> list[tuple[float, ...]]:
        """`[T]` each, at the sampling temperature or another; requests with equal prompts share its computation.

        Raises:
            ConfigError: there is no scorer of that name.
        """
        if of != POLICY and of not in self._scorers:
            known = ", ".join((POLICY, *sorted(self._scorers)))
            raise ConfigError(f"log-probs of {of!r} were asked for; the run has {known}")
        return await self._worker.run(partial(self._log_probs, requests, of, temperature))

    def _log_probs(
        self, requests: Sequence[ScoreRequest], of: str, temperature: float | None
    ) -> list[tuple[float, ...]]:
        rows = _rows_of(requests)
        batches = [part.rows for part in split_rows(rows, self._budget, streams=self._learner.streams.count)]
        if of == POLICY:
            found = list(self._learner.streams.map(partial(self._learner.log_probs, temperature=temperature), batches))
        else:
            scorer = self._scorers[of]
            packs = [pack(batch).to(scorer.loaded.device) for batch in batches]
            found = scorer.logprobs(packs, temperature=temperature)
        by_row: dict[int, tuple[float, ...]] = {}
        for batch, logprobs in zip(batches, found, strict=True):
            values = iter(floats(logprobs))
            by_row.update({id(row): tuple(next(values) for _ in row.token_ids) for row in batch})
        return [by_row[id(row)] for row in rows]

    async def move_reference(self, name: str, alpha: float) -> None:
        """The scorer becomes `alpha` x policy + (1 - `alpha`) x scorer: TR-DPO's soft update (arXiv:2404.09656).

        Raises:
            ConfigError: there is no scorer of that name, or it is a model of its own.
        """
        scorer = self._scorers.get(name)
        if not isinstance(scorer, Reference):
            follow = [known for known, scorer in self._scorers.items() if isinstance(scorer, Reference)]
            known = ", ".join(follow) or "none: it has no reference"
            raise ConfigError(f"{name!r} was to follow the policy; the scorers of this run that can are {known}")
        await self._worker.run(partial(scorer.sync, alpha))

    def published(self, *, exact: bool = True) -> None:
        """The engines sample from these weights from now on; see `Learner.published`."""
        self._learner.published(exact=exact)

    def source(self) -> Iterable[tuple[str, Tensor]]:
        """What training changes, by the module's own names; of a model with an adapter, the adapter alone."""
        return self._learner.source()

    async def weights(self) -> list[tuple[str, Tensor]]:
        """The whole model as `export` writes it; see `groupwise.model.saved_weights`."""
        return await self._worker.run(partial(saved_weights, self._learner.loaded.model))

    async def export(self, folder: Path, *, merged: bool = False) -> None:
        """Write a Hugging Face model folder; see `groupwise.policy.saving.write_model`."""
        await self._worker.run(partial(write_model, self._learner.loaded, folder, merged=merged))

    def state_dict(self) -> dict[str, Any]:
        return self._learner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._learner.load_state_dict(state)

    async def close(self) -> None:
        """Leave the model as a model, which may be trained by another policy. A second call changes nothing."""
        self._worker.close()
        self._learner.release()


def _rows_of(requests: Sequence[ScoreRequest]) -> list[TrainingRow]:
    groups: dict[Any, int] = {}
    rows: list[TrainingRow] = []
    for request in requests:
        neutral = (0.0,) * len(request.follows)
        group = groups.setdefault(request.prompt, len(groups))
        ones = (1,) * len(neutral)
        rows.append(TrainingRow(group, request.prompt, request.follows, ones, neutral, neutral, sides=request.sides))
    return rows
