"""Supervised warm-up on the same policy, data and run directory as GRPO: the loss is on the assistant's tokens only."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

from groupwise import metrics
from groupwise.algorithms.base import LossInputs, LossOutput, with_balance
from groupwise.checkpoint import find_latest, load_checkpoint, save_checkpoint
from groupwise.clock import Clock
from groupwise.config import Config
from groupwise.config.checks import check_supervised
from groupwise.data import check_supervised_rows, load_supervised, read_rows
from groupwise.data.files import Source
from groupwise.data.sampler import epoch_order
from groupwise.errors import CheckpointError, Interrupted
from groupwise.files import write_json_atomic
from groupwise.interrupt import StopRequest, catch_interrupts
from groupwise.metrics import Last
from groupwise.model.experts import check_balance_loss
from groupwise.model.loading import (
    LoadedModel,
    given_or_loaded,
    load_tokenizer,
    prepare_device,
    with_adapter,
)
from groupwise.policy import Policy
from groupwise.policy.bundle import BundleWriter
from groupwise.rollout.microbatches import split_rows
from groupwise.rundir import RunDirectory, check_place
from groupwise.tracking import build_trackers, check_backends
from groupwise.types import Denominators, Stateful, TrainingRow, Unwatched, Watcher

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SupervisedLoss:
    """Mean negative log-likelihood over the learned tokens of the whole optimiser batch."""

    needs_reference: bool = False
    needs_entropy: bool = False
    router_aux_loss_coef: float = 0.0

    def loss(self, inputs: LossInputs) -> LossOutput:
        output = LossOutput(-(inputs.logprobs * inputs.mask).sum() / inputs.denominators.tokens, {})
        coef = self.router_aux_loss_coef
        return with_balance(output, inputs, coef) if coef > 0 else output


def run_sft(
    config: Config,
    *,
    resume: bool = False,
    overwrite: bool = False,
    loaded: LoadedModel | None = None,
    train_data: Source | None = None,
    watcher: Watcher | None = None,
) -> dict[str, Any]:
    """Train on worked answers as `config` says; returns what `summary.json` holds.

    Args:
        loaded, train_data: instead of `model.path` and `data.train`.
        watcher: follows the run, and may end it.

    Raises:
        ConfigError, DataError: before a model is loaded, wherever that is possible.
        Interrupted: the user stopped the run, and a checkpoint was saved.
    """
    started = time.perf_counter()
    provided = [name for name, value in (("model.path", loaded), ("data.train", train_data)) if value is not None]
    check_supervised(config, provided=provided)
    check_backends(config.tracking)
    prepare_device(config.model.device)
    source = read_rows(config.data.train if train_data is None else train_data)
    check_supervised_rows(source, config.data, text_column=config.sft.text_column)
    tokenizer = load_tokenizer(config.model) if loaded is None else loaded.tokenizer
    data = load_supervised(
        source, config.data, tokenizer, max_tokens=config.sft.max_tokens, text_column=config.sft.text_column
    )
    steps = config.train.steps or max(1, math.ceil(config.train.epochs * len(data.rows) / config.sft.rows_per_step))
    check_place(_output(config), resume=resume, overwrite=overwrite)
    loaded = with_adapter(given_or_loaded(loaded, config.model), config.lora, seed=config.train.seed)
    check_balance_loss(loaded.model, config.algorithm.router_aux_loss_coef)
    run = RunDirectory.create(_output(config), resume=resume, overwrite=overwrite)
    run.record(config)
    with run.logging(), catch_interrupts() as stop:
        logger.info("supervised data: %s", data.describe())
        policy = Policy(
            loaded,
            SupervisedLoss(router_aux_loss_coef=config.algorithm.router_aux_loss_coef),
            optim=config.optim,
            train=config.train,
            total_updates=steps,
            gradient_checkpointing=config.model.gradient_checkpointing,
        )
        policy.bundles = BundleWriter(run, config, supervised=True)
        job = _Job(config, run, policy, rows=data.rows, steps=steps, watcher=watcher or Unwatched())
        try:
            done, losses = job.train(stop)
            policy.save_pretrained(run.final)
        finally:
            policy.release()
        summary = {
            "steps": done,
            "seconds": round(time.perf_counter() - started, 1),
            "seed": config.train.seed,
            "loss": losses[-1] if losses else None,
        }
        write_json_atomic(run.summary_file, summary)
    return summary


def _output(config: Config) -> Path:
    name = f"{Path(config.model.path).name or 'model'}-{Path(config.data.train).stem or 'data'}-sft"
    return Path(config.train.output) if config.train.output else Path("runs") / name


@dataclass(frozen=True, slots=True)
class _Job:
    config: Config
    run: RunDirectory
    policy: Policy
    _: KW_ONLY
    rows: Sequence[TrainingRow]
    steps: int
    watcher: Watcher

    def train(self, stop: StopRequest) -> tuple[int, list[float]]:
        """All steps from the newest checkpoint, or the first; returns the last step, and the losses."""
        start = self._restore() if self.run.resumed else 0
        trackers = build_trackers(
            self.config.tracking,
            run_name=self.run.path.name,
            total_steps=self.steps,
            resumed_step=start if self.run.resumed else None,
        )
        trackers.start(self.config.model_dump(mode="json"), self.run.path)
        losses: list[float] = []
        try:
            for step in range(start, self.steps):
                self.watcher.begins(step + 1, self.steps)
                found = self._step(step)
                losses.append(found["loss"])
                trackers.log(step + 1, found)
                self.watcher.updated(step + 1)
                wish = self.watcher.logged(step + 1, found)
                last = wish.stop or step + 1 == self.steps
                self._maybe_save(step + 1, last=last, stopping=bool(stop), asked=wish.save)
                if last:
                    break
        finally:
            trackers.close()
        return start + len(losses), losses

    def _step(self, step: int) -> dict[str, float]:
        clock = Clock()
        rows = self._rows_of(step)
        tokens = float(sum(sum(row.loss_mask) for row in rows))
        denominators = Denominators(tokens, float(len(rows)), float(self.config.sft.max_tokens))
        lanes = self.policy.lanes.count
        microbatches = split_rows(rows, self.config.train.micro_batch_tokens, lanes=lanes)
        learned = self.policy.learn(microbatches, denominators)
        learned.append(self.policy.optim_step())
        return metrics.resolve(metrics.merge(*learned) | {"num_tokens": Last(tokens)} | clock.metrics())

    def _maybe_save(self, step: int, *, last: bool, stopping: bool, asked: bool) -> None:
        train = self.config.train
        if last or stopping or asked or (train.save_every and step % train.save_every == 0):
            save_checkpoint(self.run.checkpoints, step, self._stateful, keep=train.keep_checkpoints)
            self.watcher.saved(step)
        if stopping and not last:
            raise Interrupted(f"stopped after step {step}; --resume goes on from there")

    def _rows_of(self, step: int) -> list[TrainingRow]:
        """The step's rows: every epoch has each row once, in an order of its own."""
        size, count = self.config.sft.rows_per_step, len(self.rows)
        chosen: list[TrainingRow] = []
        for k in range(step * size, (step + 1) * size):
            epoch, place = divmod(k, count)
            order = epoch_order(count, seed=self.config.train.seed, epoch=epoch) if self.config.data.shuffle else None
            chosen.append(self.rows[place if order is None else int(order[place])])
        return chosen

    @property
    def _stateful(self) -> dict[str, Stateful]:
        return {"policy": self.policy}

    def _restore(self) -> int:
        latest = find_latest(self.run.checkpoints)
        if latest is None:
            raise CheckpointError(f"{self.run.checkpoints} holds no complete checkpoint; start again with --overwrite")
        return load_checkpoint(latest, self._stateful)
