"""Everything in this process: build the parts of a run from its config, and call the loop."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from groupwise.algorithms import Algorithm
from groupwise.checkpoint.saver import Saver
from groupwise.config import Config
from groupwise.config.algorithm import MovingReference
from groupwise.config.checks import sampling_remark
from groupwise.config.secrets import public_values
from groupwise.config.train import TrainConfig
from groupwise.data import PromptSampler, PromptSet
from groupwise.empty_steps import EmptySteps
from groupwise.engines import build_engine
from groupwise.evaluation.counted import counted_remarks, counted_rewards
from groupwise.evaluation.evaluator import Evaluator, eval_sampling
from groupwise.files import write_json_atomic
from groupwise.interrupt import StopRequest, catch_interrupts
from groupwise.launch.preparation import Given, Prepared, make_scorer, prepare
from groupwise.launch.record import Reports, restore, summarize
from groupwise.lock import FolderLock
from groupwise.model.checkpoints import keep_base
from groupwise.model.exact.experts import check_balance_loss
from groupwise.model.loading import LoadedModel, given_or_loaded, with_adapter
from groupwise.policy import Objective, Policy
from groupwise.policy.bundle import BundleWriter
from groupwise.policy.upkeep import AdaptiveEntropy, ReferenceSync, Upkeep
from groupwise.resume import Identity, Start, describe_start, find_start, hold_place, open_run
from groupwise.rewards import RewardScorer
from groupwise.rollout import Buffer, LogprobPass, Producer, Selection
from groupwise.rollout.batch import teaches
from groupwise.rundir import RunDirectory
from groupwise.tracking import Trackers, build_trackers
from groupwise.train import TrainParts, train
from groupwise.trust import prove
from groupwise.types import Engine, RolloutGroup, SamplingParams, Stateful
from groupwise.watching import GuardedWatcher, Unwatched, Watcher
from groupwise.weight_sync import InProcessSync

__all__ = ["Given", "prepare", "run_async", "run_training", "training_sampling"]
logger = logging.getLogger(__name__)
T = TypeVar("T")
_REMEDY = "Mend what it names: the reward, the columns that it reads, or the limits on completions"
_WHERE = ". Every sample is in trajectories/ with its text and cause"


@dataclass(frozen=True, slots=True)
class _Opened:
    """The run directory, held by this process, what is in it, and what ends with the run.

    Attributes:
        judge: scores evaluations.
    """

    run: RunDirectory
    start: Start
    identity: Identity
    reports: Reports
    lock: FolderLock
    stop: StopRequest
    judge: RewardScorer

    def saver(
        self,
        parts: Mapping[str, Stateful],
        config: TrainConfig,
        watcher: Watcher,
        *,
        best: Callable[[], int | None],
    ) -> Saver:
        return Saver(
            self.run.checkpoints,
            parts,
            config,
            record=self.identity,
            confirm=self.lock.confirm,
            saved=watcher.saved,
            best=best,
        )


def run_training(
    config: Config,
    *,
    resume: bool = False,
    overwrite: bool = False,
    accept_changes: bool = False,
    given: Given | None = None,
) -> dict[str, Any]:
    """Train as `config` says, from data to `final/`; returns what `summary.json` holds.

    Args:
        accept_changes: resume also where something that decides the result has changed; it is recorded.

    Raises:
        ConfigError, DataError: before a model is loaded, wherever that is possible.
        Interrupted: the user stopped the run, and a checkpoint was saved.
    """
    given = given or Given()
    started = time.perf_counter()
    ready = prepare(config, resume=resume, overwrite=overwrite, given=given)
    config, identity = ready.config, ready.identity
    place = ready.output.absolute()  # wherever user code takes the working directory
    with hold_place(place, resume=resume, overwrite=overwrite) as lock, catch_interrupts() as stop:
        start = find_start(place, identity, resume=resume, accept=accept_changes)
        loaded = given_or_loaded(given.loaded, ready.model)
        check_balance_loss(loaded.model, config.algorithm.router_aux_loss_coef)
        run = open_run(config, identity, place, resume=resume, overwrite=overwrite)
        prove(run.path)
        keep_base(loaded, ready.model, run.path)  # after the config, which says whose folder this is
        loaded = with_adapter(loaded, config.lora, seed=config.train.seed)
        with run.logging(), closing(ready.scorer), closing(make_scorer(config, given)) as judge:
            opened = _Opened(run, start, identity, Reports(run), lock, stop, judge)
            describe_start(run, start, identity, resume=resume)
            _describe(ready)
            parts = _build(ready, given, loaded=loaded, opened=opened)
            try:
                done = run_async(_run(parts, start))
                parts.policy.save_pretrained(run.final)
            finally:
                parts.policy.release()
            seconds = time.perf_counter() - started
            summary = summarize(config, opened.reports, identity, steps=done, seconds=seconds)
            write_json_atomic(run.summary_file, summary)
    return summary


def _build(ready: Prepared, given: Given, *, loaded: LoadedModel, opened: _Opened) -> TrainParts:
    """Every component of the run."""
    config, algorithm, scorer, steps = ready.config, ready.algorithm, ready.scorer, ready.steps
    run, start, reports = opened.run, opened.start, opened.reports
    adaptive = None if algorithm.entropy_control is None else AdaptiveEntropy(algorithm, algorithm.entropy_control)
    policy = _policy(config, loaded, adaptive or algorithm, run=run, steps=steps)
    engine = build_engine(config.rollout, loaded, reserved_bytes=policy.bytes_to_come)
    buffer = _buffer(config)
    producer = _producer(config, _sampler(config, ready.train, start), engine, scorer, buffer=buffer, steps=steps)
    upkeep = _upkeep(config, policy, adaptive)
    evaluator = _evaluator(config, ready.eval, engine, scorer=opened.judge, reports=reports)
    watcher, empty = GuardedWatcher(given.watcher or Unwatched()), _empty_steps(config)
    saved: dict[str, Stateful] = {
        "policy": policy,
        "upkeep": upkeep,
        "producer": producer,
        "buffer": buffer,
        "evaluator": evaluator,
        "reports": reports,
        "empty": empty,
    }
    keep = partial(teaches, algorithm=algorithm, reward_weights=scorer.weights)
    return TrainParts(
        config=config,
        algorithm=algorithm,
        policy=policy,
        upkeep=upkeep,
        producer=producer,
        buffer=buffer,
        selection=_selection(config, buffer, producer, keep=keep),
        logprobs=_logprobs(config, policy, algorithm),
        scorer=scorer,
        weight_sync=InProcessSync(policy, engine),
        evaluator=evaluator,
        trackers=_trackers(config, run, steps=steps, start=start, accuracy_of=_counted(ready.eval, scorer)),
        saver=opened.saver(saved, config.train, watcher, best=lambda: evaluator.best.step),
        run=run,
        num_steps=steps,
        empty=empty,
        stop=opened.stop,
        watcher=watcher,
    )


def run_async(work: Coroutine[Any, Any, T]) -> T:
    """Run it to its end; in a notebook, whose own event loop is running, in another thread."""
    if not _is_in_loop():
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, work).result()


def _is_in_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


async def _run(parts: TrainParts, start: Start) -> int:
    first = restore(parts, start)
    parts.trackers.start(public_values(parts.config), parts.run.path)
    try:
        return await train(parts, start=first)
    finally:
        parts.trackers.close()
        await parts.producer.close()


def _describe(ready: Prepared) -> None:
    """What there is to learn from and to evaluate on; with warnings where some of it does not act."""
    for name, found in (("training", ready.train), ("evaluation", ready.eval)):
        if found is not None and found.prompts:
            level = logging.WARNING if found.num_too_long else logging.INFO
            logger.log(level, "%s data: %s", name, found.describe())
    if remark := sampling_remark(ready.config):
        logger.warning(remark)


def training_sampling(config: Config) -> SamplingParams:
    """How the samples that are learned from are drawn."""
    rollout = config.rollout
    return SamplingParams(
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        min_p=rollout.min_p,
        repetition_penalty=rollout.repetition_penalty,
        max_tokens=rollout.max_completion_tokens,
        min_tokens=rollout.min_completion_tokens,
        stop=rollout.stop,
        stop_token_ids=rollout.stop_token_ids,
        seed=config.train.seed,
    )


def _sampler(config: Config, data: PromptSet, start: Start) -> PromptSampler:
    return PromptSampler(
        data.prompts,
        seed=config.train.seed,
        shuffle=config.data.shuffle,
        same_data=not start.changes,  # or the difference was accepted
    )


def _producer(
    config: Config, sampler: PromptSampler, engine: Engine, scorer: RewardScorer, *, buffer: Buffer, steps: int
) -> Producer:
    return Producer(
        engine,
        scorer,
        sampler,
        buffer,
        sampling=training_sampling(config),
        group_size=config.rollout.group_size,
        total_steps=steps,
    )


def _buffer(config: Config) -> Buffer:
    return Buffer(prompts_per_step=config.rollout.prompts_per_step, max_off_policy_steps=0)


def _trackers(config: Config, run: RunDirectory, *, steps: int, start: Start, accuracy_of: str) -> Trackers:
    return build_trackers(
        config.tracking,
        run_name=run.path.name,
        total_steps=steps,
        resumed_step=start.step,
        accuracy_of=accuracy_of,
    )


def _counted(held_out: PromptSet | None, scorer: RewardScorer) -> str:
    """The reward that accuracy counts, with a warning where another weighs more."""
    if held_out is None:
        return ""
    sources = dict.fromkeys(prompt.data_source for prompt in held_out.prompts)
    for remark in counted_remarks(scorer, sources):
        logger.warning(remark)
    return counted_rewards(scorer, sources)


def _policy(config: Config, loaded: LoadedModel, objective: Objective, *, run: RunDirectory, steps: int) -> Policy:
    policy = Policy(
        loaded,
        objective,
        optim=config.optim,
        train=config.train,
        total_updates=steps * config.optim.updates_per_batch,
        temperature=config.rollout.temperature,
        gradient_checkpointing=config.model.gradient_checkpointing,
    )
    policy.bundles = BundleWriter(run, config)
    return policy


def _selection(
    config: Config, buffer: Buffer, producer: Producer, *, keep: Callable[[RolloutGroup], bool]
) -> Selection:
    rollout = config.rollout
    return Selection(
        buffer, producer, prompts_per_step=rollout.prompts_per_step, cap=rollout.dynamic_sampling_cap, teaches=keep
    )


def _logprobs(config: Config, policy: Policy, algorithm: Algorithm) -> LogprobPass:
    return LogprobPass(
        policy,
        old=config.recomputes_logprobs,
        reference=algorithm.kl_in_reward,
        micro_batch_tokens=config.train.micro_batch_tokens,
    )


def _upkeep(config: Config, policy: Policy, adaptive: AdaptiveEntropy | None) -> Upkeep:
    reference, moves = policy.reference, config.algorithm.reference
    if reference is None or not isinstance(moves, MovingReference):
        return Upkeep(entropy=adaptive, sync=None)
    return Upkeep(entropy=adaptive, sync=ReferenceSync(reference, moves.sync_every, moves.mixup))


def _evaluator(
    config: Config, data: PromptSet | None, engine: Engine, *, scorer: RewardScorer, reports: Reports
) -> Evaluator:
    """With a scorer of its own, so that training's reward metrics hold training's rewards alone."""
    return Evaluator(
        engine,
        () if data is None else data.prompts,
        scorer=scorer,
        config=config.eval,
        sampling=eval_sampling(config.eval, config.rollout, seed=config.train.seed),
        on_report=reports.add,
        keep_best=config.train.keep_best,
    )


def _empty_steps(config: Config) -> EmptySteps:
    where = _WHERE if config.train.trajectories else ""
    return EmptySteps(config.train.stop_after_empty_steps, remedy=_REMEDY + where)
