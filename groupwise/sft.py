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
from groupwise.checkpoint.saver import Saver
from groupwise.clock import Clock
from groupwise.config import Config, ModelConfig
from groupwise.config.checks import check_supervised
from groupwise.config.limits import check_lengths, say_high_rate
from groupwise.config.model_name import short_name
from groupwise.config.secrets import public_values
from groupwise.data import SupervisedSet, check_supervised_rows, load_supervised
from groupwise.data.files import Source, read_for_training
from groupwise.data.sampler import epoch_order
from groupwise.empty_steps import EmptySteps, Usable
from groupwise.errors import Interrupted
from groupwise.files import write_json_atomic
from groupwise.fingerprint import machine_facts, model_facts, supervised_facts
from groupwise.interrupt import StopRequest, catch_interrupts, interrupted
from groupwise.metrics import Last
from groupwise.model.checkpoints import keep_base, settle_model
from groupwise.model.exact.experts import check_balance_loss
from groupwise.model.limits import find_limits
from groupwise.model.loading import (
    LoadedModel,
    given_or_loaded,
    load_tokenizer,
    prepare_device,
    resolve_device,
    resolve_dtype,
    with_adapter,
)
from groupwise.model.outline import check_model
from groupwise.policy import Policy
from groupwise.policy.bundle import BundleWriter
from groupwise.resume import Identity, Start, describe_start, find_start, hold_place, open_run
from groupwise.rollout.microbatches import split_rows
from groupwise.rundir import RunDirectory, check_place, describe_place
from groupwise.tracking import build_trackers, check_backends
from groupwise.trust import prove
from groupwise.types import Denominators, Stateful, Tokenizer, TrainingRow
from groupwise.watching import GuardedWatcher, Unwatched, Watcher

logger = logging.getLogger(__name__)

_REMEDY = "Raise sft.max_tokens, or look at the rows: each needs an answer within it"


@dataclass(frozen=True, slots=True)
class SupervisedLoss:
    """Mean negative log-likelihood over the learned tokens of the whole optimiser batch."""

    needs_reference: bool = False
    needs_entropy: bool = False
    router_aux_loss_coef: float = 0.0

    def loss(self, inputs: LossInputs) -> LossOutput:
        output = LossOutput(-(inputs.logprobs * inputs.mask).sum() / max(inputs.denominators.tokens, 1.0), {})
        coef = self.router_aux_loss_coef
        return with_balance(output, inputs, coef) if coef > 0 else output


@dataclass(frozen=True, slots=True)
class PreparedSft:
    """A run that passed every check that needs no weights; `config` and `model` as in GRPO's."""

    config: Config
    model: ModelConfig
    data: SupervisedSet
    steps: int
    output: Path
    identity: Identity

    def describe(self, *, resume: bool) -> str:
        """What `--dry-run` says of it."""
        rows = self.config.sft.rows_per_step
        return (
            f"# {self.config.data.train}: {self.data.describe()}\n# {self.steps:,} steps of {rows} rows\n"
            f"# {describe_place(self.output, resume=resume)}"
        )


def prepare_sft(
    config: Config,
    *,
    resume: bool = False,
    overwrite: bool = False,
    loaded: LoadedModel | None = None,
    train_data: Source | None = None,
) -> PreparedSft:
    """Check all that a run of this config needs and that can be known without weights. Nothing is written.

    Raises:
        ConfigError, DataError: what the run would be refused for.
    """
    provided = [name for name, value in (("model.path", loaded), ("data.train", train_data)) if value is not None]
    begun = settle_model(config, _output(config), resume=resume, given=loaded)
    config, model = begun.config, begun.model
    check_supervised(config, provided=[*provided, *begun.provided])
    check_backends(config.tracking)
    prepare_device(config.model.device)
    needed = None if config.train.steps is None else config.train.steps * config.sft.rows_per_step
    given_rows = config.data.train if train_data is None else train_data
    source = read_for_training(given_rows, needed=needed, setting="train.steps")
    check_supervised_rows(source, config.data, text_column=config.sft.text_column)
    tokenizer = load_tokenizer(model) if loaded is None else loaded.tokenizer
    data = load_supervised(
        source, config.data, tokenizer, max_tokens=config.sft.max_tokens, text_column=config.sft.text_column
    )
    limits = find_limits(loaded, model)
    whole = [(*row.prompt_ids, *row.token_ids) for row in data.rows]
    check_lengths(whole, limits, most=0, setting="sft.max_tokens", prompts="conversations")
    say_high_rate(config.optim, limits, lora=config.lora.rank > 0)
    steps = config.train.steps or max(1, math.ceil(config.train.epochs * len(data.rows) / config.sft.rows_per_step))
    output = _output(config)
    check_place(output, resume=resume, overwrite=overwrite)
    if loaded is None:
        check_model(model, config.lora)
    return PreparedSft(config, model, data, steps, output, _identity(config, loaded, data, tokenizer))


def run_sft(
    config: Config,
    *,
    resume: bool = False,
    overwrite: bool = False,
    accept_changes: bool = False,
    loaded: LoadedModel | None = None,
    train_data: Source | None = None,
    watcher: Watcher | None = None,
) -> dict[str, Any]:
    """Train on worked answers as `config` says; returns what `summary.json` holds.

    Args:
        accept_changes: resume also where something that decides the result has changed; it is recorded.
        loaded, train_data: instead of `model.path` and `data.train`.
        watcher: follows the run, and may end it.

    Raises:
        ConfigError, DataError: before a model is loaded, wherever that is possible.
        Interrupted: the user stopped the run, and a checkpoint was saved.
    """
    started = time.perf_counter()
    ready = prepare_sft(config, resume=resume, overwrite=overwrite, loaded=loaded, train_data=train_data)
    config, data, steps, identity = ready.config, ready.data, ready.steps, ready.identity
    place = ready.output.absolute()
    with hold_place(place, resume=resume, overwrite=overwrite) as lock, catch_interrupts() as stop:
        start = find_start(place, identity, resume=resume, accept=accept_changes)
        loaded = given_or_loaded(loaded, ready.model)
        check_balance_loss(loaded.model, config.algorithm.router_aux_loss_coef)
        run = open_run(config, identity, place, resume=resume, overwrite=overwrite)
        prove(run.path)
        keep_base(loaded, ready.model, run.path)  # after the config, which says whose folder this is
        loaded = with_adapter(loaded, config.lora, seed=config.train.seed)
        with run.logging():
            describe_start(run, start, identity, resume=resume)
            level = logging.WARNING if data.num_too_long else logging.INFO
            logger.log(level, "supervised data: %s", data.describe())
            policy = _policy(config, run, loaded, steps=steps)
            progress, watcher = _Progress(), GuardedWatcher(watcher or Unwatched())
            empty = EmptySteps(config.train.stop_after_empty_steps, remedy=_REMEDY)
            saved: dict[str, Stateful] = {"policy": policy, "progress": progress, "empty": empty}
            saver = Saver(
                run.checkpoints, saved, config.train, record=identity, confirm=lock.confirm, saved=watcher.saved
            )
            job = _Job(
                config, run, policy, saver, rows=data.rows, steps=steps, watcher=watcher, progress=progress, empty=empty
            )
            try:
                done = job.train(stop, start)
                policy.save_pretrained(run.final)
            finally:
                policy.release()
            seconds = time.perf_counter() - started
            summary = _summary(config, identity, steps=done, seconds=seconds, loss=progress.loss)
            write_json_atomic(run.summary_file, summary)
    return summary


def _policy(config: Config, run: RunDirectory, loaded: LoadedModel, *, steps: int) -> Policy:
    policy = Policy(
        loaded,
        SupervisedLoss(router_aux_loss_coef=config.algorithm.router_aux_loss_coef),
        optim=config.optim,
        train=config.train,
        total_updates=steps,
        gradient_checkpointing=config.model.gradient_checkpointing,
    )
    policy.bundles = BundleWriter(run, config, supervised=True)
    return policy


def _summary(config: Config, identity: Identity, *, steps: int, seconds: float, loss: float | None) -> dict[str, Any]:
    summary: dict[str, Any] = {
        "steps": steps,
        "seconds": round(seconds, 1),
        "seed": config.train.seed,
        "loss": loss,
    }
    if identity.accepted:
        summary["accepted_changes"] = identity.accepted
    return summary


def _identity(config: Config, given: LoadedModel | None, data: SupervisedSet, tokenizer: Tokenizer) -> Identity:
    device = resolve_device(config.model.device)
    module = None if given is None else given.model
    return Identity.of(
        config,
        supervised_facts(data.rows, num_rows=data.num_rows)
        | model_facts(config, tokenizer, module, compared=False)
        | machine_facts(str(device), str(resolve_dtype(config.model.dtype, device))),
    )


def _output(config: Config) -> Path:
    name = f"{short_name(config.model.path)}-{Path(config.data.train).stem or 'data'}-sft"
    return Path(config.train.output) if config.train.output else Path("runs") / name


@dataclass(slots=True)
class _Progress:
    """The last step's loss, for the summary."""

    loss: float | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"loss": self.loss}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loss = state["loss"]


@dataclass(frozen=True, slots=True)
class _Job:
    config: Config
    run: RunDirectory
    policy: Policy
    saver: Saver
    _: KW_ONLY
    rows: Sequence[TrainingRow]
    steps: int
    watcher: Watcher
    progress: _Progress
    empty: EmptySteps

    def train(self, stop: StopRequest, start: Start) -> int:
        """All steps from the checkpoint to start from, or the first; returns the last step."""
        done = self._restore(start)
        trackers = build_trackers(
            self.config.tracking,
            run_name=self.run.path.name,
            total_steps=self.steps,
            resumed_step=start.step,
        )
        trackers.start(public_values(self.config), self.run.path)
        try:
            for step in range(done, self.steps):
                self.watcher.begins(step + 1, self.steps)
                found = self._step(step)
                done, self.progress.loss = step + 1, found["loss"]
                trackers.log(step + 1, found)
                self.watcher.updated(step + 1)
                wish = self.watcher.logged(step + 1, found)
                last = wish.stop or step + 1 == self.steps
                stopping = bool(stop)  # read once: a request that comes after the save must wait for the next one
                self.saver.after(step + 1, now=last or stopping or wish.save)
                self.empty.check(step + 1, last=last)
                if last:
                    break
                if stopping:
                    raise Interrupted(interrupted(self.run.path, step + 1))
        finally:
            trackers.close()
        return done

    def _step(self, step: int) -> dict[str, float]:
        clock = Clock()
        rows = self._rows_of(step)
        tokens = float(sum(sum(row.loss_mask) for row in rows))
        denominators = Denominators(tokens, float(len(rows)), float(self.config.sft.max_tokens))
        lanes = self.policy.lanes.count
        microbatches = split_rows(rows, self.config.train.micro_batch_tokens, lanes=lanes)
        learned = self.policy.learn(microbatches, denominators)
        learned.append(self.policy.optim_step())
        learned.append(self.empty.after(step + 1, Usable(int(tokens), ("the row has no token to learn",) * len(rows))))
        return metrics.resolve(metrics.merge(*learned) | {"num_tokens": Last(tokens)} | clock.metrics())

    def _rows_of(self, step: int) -> list[TrainingRow]:
        """The step's rows: every epoch has each row once, in an order of its own."""
        size, count = self.config.sft.rows_per_step, len(self.rows)
        chosen: list[TrainingRow] = []
        for k in range(step * size, (step + 1) * size):
            epoch, place = divmod(k, count)
            order = epoch_order(count, seed=self.config.train.seed, epoch=epoch) if self.config.data.shuffle else None
            chosen.append(self.rows[place if order is None else int(order[place])])
        return chosen

    def _restore(self, start: Start) -> int:
        if start.checkpoint is None:
            return 0
        step = start.checkpoint.load(self.saver.parts, optional=("progress", "empty"))
        if start.changes:
            self.saver.save(step)  # the next resume compares with what was accepted
        return step
