"""What a policy does with one module: gradients of an objective over micro-batches, updates, log-probs, state."""

from __future__ import annotations

import hashlib
import itertools
import logging
import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from groupwise.algorithms.base import LossInputs, LossOutput
from groupwise.batches import NO_KNOBS, Denominators, Knobs, TrainingRow
from groupwise.config import OptimConfig, TrainConfig
from groupwise.errors import TrainingError
from groupwise.metrics import Last, Mean, Metrics, Sum
from groupwise.model.adapters import dropout_layers
from groupwise.model.exact.experts import experts_of
from groupwise.model.fast_cpu.host_memory import give_freed_memory_back
from groupwise.model.forward.head import TokenScores
from groupwise.model.forward.packing import Packed, pack
from groupwise.model.forward.recompute import recompute_layers
from groupwise.model.forward.routing import Routing
from groupwise.model.loading import LoadedModel
from groupwise.policy.adapter_reference import make_reference
from groupwise.policy.balance import routing_of, with_expert_counts
from groupwise.policy.bundle import BundleWriter, LearnedBatch
from groupwise.policy.loss_inputs import loss_inputs
from groupwise.policy.microbatches import MicroBatch
from groupwise.policy.mismatch import mismatch_metrics
from groupwise.policy.optimizer import Gradient, MasterOptimizer
from groupwise.policy.reference import Reference
from groupwise.policy.replayed import tell_strangers
from groupwise.policy.schedule import learning_rate
from groupwise.policy.streams import Streams

logger = logging.getLogger(__name__)


class Objective(Protocol):
    """What is minimised: an algorithm's policy loss, or the supervised loss."""

    @property
    def needs_reference(self) -> bool: ...

    @property
    def needs_entropy(self) -> bool: ...

    @property
    def router_aux_loss_coef(self) -> float: ...

    def loss(self, inputs: LossInputs) -> LossOutput: ...

    def turned(self, knobs: Knobs) -> Objective:
        """The objective with the numbers of this step."""
        ...


class LearningStopped(Exception):
    """Somebody asked `learn` to stop."""


@dataclass(frozen=True, slots=True)
class _Pass:
    """A micro-batch on its way: its number since the last update, packed, and the reference's log-probs `[M]`."""

    number: int
    batch: MicroBatch
    packed: Packed
    reference: Tensor | None


@dataclass(frozen=True, slots=True)
class _Passed:
    """Loss, metrics, and the gradients that have not been added yet."""

    loss: float
    metrics: Metrics
    gradients: tuple[Tensor | None, ...]


class Learner:
    """A model with its optimiser. Micro-batch losses add up until `optim_step`.

    Args:
        objective: decides whether the initial policy is kept as the `reference`.
        temperature: of sampling; log-probs are those of the sampled distribution.
        total_updates: optimiser steps of the whole run, for the schedule.
        gradient_checkpointing: recompute each layer in the backward pass.
        bundles: writes what led to a gradient that is not finite; None writes nothing.

    Attributes:
        streams: micro-batches are computed side by side on these.

    Example:
        learner = Learner(load_model(config.model), objective, optim=config.optim, train=train, total_updates=500)
        metrics = learner.learn(microbatches, denominators)
        update = learner.optim_step()
    """

    def __init__(
        self,
        loaded: LoadedModel,
        objective: Objective,
        *,
        optim: OptimConfig,
        train: TrainConfig,
        total_updates: int,
        temperature: float = 1.0,
        gradient_checkpointing: bool = False,
        bundles: BundleWriter | None = None,
    ) -> None:
        self.loaded = loaded
        self.bundles = bundles
        self._objective = objective
        self._optim_config = optim
        self._seed = train.seed
        self._total_updates = total_updates
        self._temperature = temperature
        self._chunk_tokens = train.logprob_chunk_tokens
        self._checkpointing = gradient_checkpointing
        self._dropout = dropout_layers(loaded.model)
        self._is_mixture = bool(experts_of(loaded.model))
        self.streams = Streams(loaded.model)
        self.reference: Reference | None = None
        if objective.needs_reference:
            self.reference = make_reference(loaded, temperature=temperature, chunk_tokens=train.logprob_chunk_tokens)
        if gradient_checkpointing:
            recompute_layers(loaded.model)
        if self._is_mixture and loaded.adapter is not None:
            logger.info("the experts and their routers have no adapter: LoRA leaves them as they are")
        self._optimizer = MasterOptimizer(loaded.model, optim, ends=_ends(loaded))
        self._learned: list[LearnedBatch] = []
        self._updates = 0
        self._skipped = 0
        self._is_sampler = False
        self._samples_exactly = True

    @property
    def _is_exact(self) -> bool:
        """Whether sampler and trainer have the same bits where nothing is wrong."""
        return self._samples_exactly and self.loaded.device.type == "cpu" and not self._dropout

    @property
    def bytes_to_come(self) -> int:
        """Memory that training will take beside activations, and has not taken yet."""
        return self._optimizer.bytes_to_come

    def forward_backward(self, batch: MicroBatch, denominators: Denominators) -> Metrics:
        """Add the gradient of one micro-batch; metrics of its tokens.

        Args:
            denominators: of the whole optimiser batch, so that the sum over micro-batches is the batch's gradient.
        """
        return self.learn((batch,), denominators)[0]

    def learn(
        self,
        batches: Sequence[MicroBatch],
        denominators: Denominators,
        knobs: Knobs = NO_KNOBS,
        *,
        stopped: Callable[[], bool] = lambda: False,
    ) -> list[Metrics]:
        """`forward_backward` of each micro-batch; side by side where that pays. Gradients are added in order.

        Without one there is nothing to learn, and the loss is 0. An error takes all gradients since the last update
        with it: half of an update is none.

        Args:
            stopped: asked before each pass.

        Raises:
            LearningStopped: it said yes.
        """
        if not batches:
            return [{"loss": Sum(0.0)}]
        try:
            return self._learn(batches, denominators, knobs, stopped)
        except BaseException:
            self._forget()
            raise

    def _learn(
        self, batches: Sequence[MicroBatch], denominators: Denominators, knobs: Knobs, stopped: Callable[[], bool]
    ) -> list[Metrics]:
        packs = [pack(batch.rows).to(self.loaded.device) for batch in batches]
        if self._objective.router_aux_loss_coef > 0:
            streams = self.streams
            denominators = with_expert_counts(denominators, self.loaded.scoring, streams, batches=batches, packs=packs)
        passes = [
            _Pass(len(self._learned) + place, *each)
            for place, each in enumerate(zip(batches, packs, self._references(batches, packs), strict=True))
        ]
        apart = min(self.streams.count, len(passes)) > 1
        objective = self._objective.turned(knobs)

        def run(one: _Pass) -> _Passed:
            if stopped():
                raise LearningStopped
            return self._run(one, objective, denominators, apart=apart)

        metrics: list[Metrics] = []
        for learning, some in itertools.groupby(passes, lambda one: one.batch.backward):
            turn = list(some)
            with self._learning_mode(learning):
                for one, passed in zip(turn, self.streams.map(run, turn), strict=True):
                    if passed.gradients:
                        self._optimizer.add(passed.gradients)
                    self._learned.append(LearnedBatch(one.batch, denominators, passed.loss, knobs))
                    metrics.append(passed.metrics)
        return metrics

    def _references(self, batches: Sequence[MicroBatch], packs: Sequence[Packed]) -> Sequence[Tensor | None]:
        """The reference's log-probs, where rows do not bring them along. Before the policy's own passes, because with
        LoRA it is the same module."""
        if self.reference is None or all(batch.rows[0].ref_logprobs is not None for batch in batches):
            return [None] * len(packs)
        return self.reference.logprobs(packs)

    def _run(self, one: _Pass, objective: Objective, denominators: Denominators, *, apart: bool) -> _Passed:
        """Forward and backward of one micro-batch.

        Args:
            apart: keep the gradients apart, because others are computed at the same time.
        """
        gradients: tuple[Tensor | None, ...] = ()
        with torch.set_grad_enabled(one.batch.backward), self._dropping(one):
            weighs = objective.router_aux_loss_coef > 0
            routing = routing_of(one.batch, one.packed, keeps_logits=weighs) if self._is_mixture else None
            scores = self._scores(one.packed, objective.needs_entropy, routing)
            inputs = loss_inputs(one.batch.rows, one.packed, scores, denominators, reference=one.reference)
            if routing is not None and denominators.expert_counts is not None:
                inputs = replace(inputs, balance=routing.balance(denominators.expert_counts, denominators.tokens))
            output = objective.loss(inputs)
            if one.batch.backward and apart:
                gradients = self._optimizer.gradients_of(output.loss)
            elif one.batch.backward:
                output.loss.backward()  # pyright: ignore[reportUnknownMemberType]
        loss = float(output.loss.detach())
        metrics = dict(output.metrics)
        metrics["loss"] = Sum(loss)
        if routing is not None:
            metrics.update(routing.metrics())
            tell_strangers(one.batch.rows, one.packed, routing)
        if self._is_sampler:
            metrics.update(mismatch_metrics(one.batch.rows, inputs, exact=self._is_exact))
        return _Passed(loss, metrics, gradients)

    @contextmanager
    def _learning_mode(self, learning: bool) -> Generator[None, None, None]:
        """Training mode as far as a gradient needs it, until its backward pass has recomputed what it recomputes."""
        self.loaded.model.train(learning and self._checkpointing)
        for layer in self._dropout:
            layer.train(learning)
        try:
            yield
        finally:
            self.loaded.model.eval()

    @contextmanager
    def _dropping(self, one: _Pass) -> Generator[None, None, None]:
        """Dropout is drawn from a key, not from a generator's state, so that a resumed run draws the same."""
        drops = one.batch.backward and bool(self._dropout)
        devices = [self.loaded.device] if self.loaded.device.type == "cuda" else []
        with torch.random.fork_rng(devices, enabled=drops):  # pyright: ignore[reportUnknownMemberType]
            if drops:
                key = f"{self._seed}/{self._updates}/{one.number}"
                number = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=7).digest())
                torch.manual_seed(number)  # pyright: ignore[reportUnknownMemberType]
            yield

    def _scores(
        self, packed: Packed, with_entropy: bool, routing: Routing | None = None, *, temperature: float | None = None
    ) -> TokenScores:
        return self.loaded.scoring(
            packed,
            temperature=self._temperature if temperature is None else temperature,
            chunk_tokens=self._chunk_tokens,
            with_entropy=with_entropy,
            routing=routing,
            as_sampled=True,
        )

    @torch.no_grad()
    def log_probs(self, rows: Sequence[TrainingRow], *, temperature: float | None = None) -> Tensor:
        """`[M]` log-probs of the rows' completion tokens, row after row, at the sampling temperature or another."""
        return self._scores(pack(rows).to(self.loaded.device), False, temperature=temperature).logprobs

    def optim_step(self) -> Metrics:
        """Clip, update, forget the gradients. A gradient that is not finite skips the update; three in a row raise.

        Raises:
            TrainingError: the third non-finite gradient in a row.
        """
        rate = learning_rate(self._optim_config, self._updates, self._total_updates)
        norm = self._optimizer.clip(self._optim_config.max_grad_norm)
        finite = math.isfinite(norm)
        if finite:
            self._optimizer.step(rate)
            self._skipped = 0
            self._is_sampler = False
        else:
            self._skip(norm)
        self._learned.clear()
        self._updates += 1
        if self.loaded.device.type == "cpu":
            give_freed_memory_back(self.loaded.text_config.hidden_size)
        return {"grad_norm": Mean(norm), "learning_rate": Last(rate), "updates_skipped": Sum(0.0 if finite else 1.0)}

    def _skip(self, norm: float) -> None:
        bundle = None
        if self.bundles is not None:
            bundle = self.bundles.write(
                self._updates,
                self._learned,
                gradients=self._optimizer.gradients(),
                weights=self._optimizer.masters(),
            )
        self._optimizer.forget_gradients()
        self._skipped += 1
        where = "" if bundle is None else f"; everything to reproduce it is in {bundle}"
        logger.warning("update %d skipped: the gradient norm is %s%s", self._updates, norm, where)
        if self._skipped == 3:
            raise TrainingError(
                "three updates in a row had a gradient that is not finite; lower optim.lr, or look at the rewards "
                f"and log-probs of the last steps in trajectories/{where}"
            )

    def gradients_of(
        self, learned: Sequence[LearnedBatch], *, update: int, weights: Mapping[str, Tensor]
    ) -> dict[str, Gradient]:
        """The gradients that these micro-batches give at these weights, as update number `update`; what a bundle
        holds is computed again so."""
        self._optimizer.set_masters(weights)
        self._updates = update
        self._learned.clear()
        for (denominators, knobs), some in itertools.groupby(learned, lambda each: (each.denominators, each.knobs)):
            self.learn([each.batch for each in some], denominators, knobs)
        found = self._optimizer.gradients()
        self._forget()
        return found

    def _forget(self) -> None:
        """The update begins anew."""
        self._optimizer.forget_gradients()
        self._learned.clear()

    def published(self, *, exact: bool = True) -> None:
        """The engines sample from these weights from now on.

        Args:
            exact: they compute what this module does, to the last bit.
        """
        self._is_sampler, self._samples_exactly = True, exact

    def state_dict(self) -> dict[str, Any]:
        # The dtype is for who lays the masters over the base without this run's settings at hand: `model.checkpoints`.
        return {
            "updates": self._updates,
            "skipped": self._skipped,
            "dtype": str(self.loaded.model.dtype).removeprefix("torch."),
            "optimizer": self._optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._updates = int(state["updates"])
        self._skipped = int(state["skipped"])
        self._optimizer.load_state_dict(state["optimizer"])

    def release(self) -> None:
        """Leave the model as a model, which may be trained by another policy."""
        if self._checkpointing:
            recompute_layers(self.loaded.model, False)
        self._optimizer.release()

    def source(self) -> Iterator[tuple[str, Tensor]]:
        """What training changes, by the module's names: parameters that are trained, and buffers that are saved."""
        model = self.loaded.model
        yield from ((name, weight.detach()) for name, weight in model.named_parameters() if weight.requires_grad)
        if self.loaded.adapter is None:
            saved = model.state_dict().keys()
            yield from ((name, buffer) for name, buffer in model.named_buffers() if name in saved)


def _ends(loaded: LoadedModel) -> list[Tensor]:
    """The weights of embedding and head."""
    layers = cast(
        "tuple[nn.Module | None, ...]", (loaded.model.get_input_embeddings(), loaded.model.get_output_embeddings())
    )
    return [weight for layer in layers if layer is not None for weight in layer.parameters()]
