"""Everything in this process: build the parts of a run from its config, and call the loop."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from groupwise.algorithms import Algorithm, build_algorithm
from groupwise.checkpoint.saver import Saver
from groupwise.config import Config
from groupwise.config.checks import check_trainable, sampling_remark
from groupwise.config.secrets import public_values
from groupwise.config.train import TrainConfig
from groupwise.data import PromptSampler, PromptSet, check_rows, load_prompts, read_rows
from groupwise.data.files import Source
from groupwise.empty_steps import EmptySteps
from groupwise.engines import build_engine, check_engine
from groupwise.evaluation.counted import counted_remarks, counted_rewards
from groupwise.evaluation.evaluator import Evaluator, eval_sampling
from groupwise.files import write_json_atomic
from groupwise.fingerprint import machine_facts, model_facts, prompt_facts, reward_facts
from groupwise.interrupt import StopRequest, catch_interrupts
from groupwise.launch.record import Reports, restore, summarize
from groupwise.lock import FolderLock
from groupwise.model.loading import (
    LoadedModel,
    given_or_loaded,
    load_tokenizer,
    prepare_device,
    resolve_device,
    resolve_dtype,
    with_adapter,
)
from groupwise.policy import Objective, Policy
from groupwise.policy.bundle import BundleWriter
from groupwise.policy.upkeep import AdaptiveEntropy, ReferenceSync, Upkeep
from groupwise.resume import Identity, Start, describe_start, find_start, hold_place, open_run
from groupwise.rewards import RewardScorer
from groupwise.rollout import Buffer, LogprobPass, Producer, Selection
from groupwise.rollout.batch import teaches
from groupwise.rundir import RunDirectory
from groupwise.tracking import Trackers, build_trackers, check_backends
from groupwise.train import TrainParts, train
from groupwise.types import Engine, RolloutGroup, SamplingParams, Stateful, Tokenizer, Unwatched, Watcher
from groupwise.weight_sync import InProcessSync

logger = logging.getLogger(__name__)
T = TypeVar("T")
_REMEDY = "Mend what it names: the reward, the columns that it reads, or the limits on completions"
_WHERE = ". Every sample is in trajectories/ with its text and cause"


@dataclass(frozen=True, slots=True)
class Given:
    """What a Python program hands over as objects instead of naming it in the config.

    Attributes:
        loaded: instead of `model.path`.
        train_data, eval_data: instead of `data.train` and `data.eval`: a `datasets.Dataset`, or rows.
        rewards: functions beside those in the config, with `reward_weights` (all 1 when empty).
        watcher: follows the run, and may end it.
    """

    loaded: LoadedModel | None = None
    train_data: Source | None = None
    eval_data: Source | None = None
    rewards: Sequence[Callable[..., Any]] = ()
    reward_weights: Sequence[float] = ()
    watcher: Watcher | None = None

    @property
    def names(self) -> tuple[str, ...]:
        present = {
            "model.path": self.loaded,
            "data.train": self.train_data,
            "data.eval": self.eval_data,
            "reward": self.rewards or None,
        }
        return tuple(name for name, value in present.items() if value is not None)


@dataclass(frozen=True, slots=True)
class _Data:
    train: PromptSet
    eval: PromptSet | None
    tokenizer: Tokenizer


@dataclass(frozen=True, slots=True)
class _Opened:
    """The run directory, held by this process, and what is in it."""

    run: RunDirectory
    start: Start
    identity: Identity
    reports: Reports
    lock: FolderLock
    stop: StopRequest

    def saver(self, parts: Mapping[str, Stateful], config: TrainConfig, watcher: Watcher) -> Saver:
        return Saver(
            self.run.checkpoints, parts, config, record=self.identity, confirm=self.lock.confirm, saved=watcher.saved
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
    check_trainable(config, provided=given.names)
    check_engine(config.rollout.engine)
    check_backends(config.tracking)
    prepare_device(config.model.device)
    algorithm = build_algorithm(config.algorithm)
    scorer = _scorer(config, given)
    data = _load_data(config, given, scorer)
    identity = _identity(config, given, data, algorithm)
    place = _output(config)
    with hold_place(place, resume=resume, overwrite=overwrite) as lock, catch_interrupts() as stop:
        start = find_start(place, identity, resume=resume, accept=accept_changes)
        loaded = with_adapter(given_or_loaded(given.loaded, config.model), config.lora, seed=config.train.seed)
        run = open_run(config, identity, place, resume=resume, overwrite=overwrite)
        opened = _Opened(run, start, identity, Reports(run), lock, stop)
        with run.logging():
            describe_start(run, start, identity, resume=resume)
            _describe(data, config)
            parts = _build(config, given, data, algorithm=algorithm, scorer=scorer, loaded=loaded, opened=opened)
            try:
                done = run_async(_run(parts, start))
                parts.policy.save_pretrained(run.final)
            finally:
                parts.policy.release()
            seconds = time.perf_counter() - started
            summary = summarize(config, opened.reports, identity, steps=done, seconds=seconds)
            write_json_atomic(run.summary_file, summary)
    return summary


def _build(
    config: Config,
    given: Given,
    data: _Data,
    *,
    algorithm: Algorithm,
    scorer: RewardScorer,
    loaded: LoadedModel,
    opened: _Opened,
) -> TrainParts:
    """Every component of the run."""
    run, start, reports = opened.run, opened.start, opened.reports
    steps = _num_steps(config, len(data.train.prompts))
    adaptive = None if algorithm.entropy_control is None else AdaptiveEntropy(algorithm, algorithm.entropy_control)
    policy = _policy(config, loaded, adaptive or algorithm, run=run, steps=steps)
    engine = build_engine(config.rollout, loaded, reserved_bytes=policy.bytes_to_come)
    buffer = _buffer(config)
    producer = _producer(config, _sampler(config, data, start), engine, scorer, buffer=buffer, steps=steps)
    upkeep = _upkeep(config, policy, adaptive)
    evaluator = _evaluator(config, given, data, engine, reports=reports)
    watcher, empty = given.watcher or Unwatched(), _empty_steps(config)
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
        trackers=_trackers(config, run, steps=steps, start=start, accuracy_of=_counted(data, scorer)),
        saver=opened.saver(saved, config.train, watcher),
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


def _identity(config: Config, given: Given, data: _Data, algorithm: Algorithm) -> Identity:
    device = resolve_device(config.model.device)
    module = None if given.loaded is None else given.loaded.model
    compared = algorithm.needs_reference
    return Identity.of(
        config,
        prompt_facts(data.train.prompts, num_rows=data.train.num_rows)
        | model_facts(config, data.tokenizer, module, compared=compared)
        | reward_facts(config, given.rewards)
        | machine_facts(str(device), str(resolve_dtype(config.model.dtype, device))),
    )


def _scorer(config: Config, given: Given) -> RewardScorer:
    return RewardScorer(config.reward, functions=given.rewards, function_weights=given.reward_weights)


def _load_data(config: Config, given: Given, scorer: RewardScorer) -> _Data:
    """Check the rows' shape first: that needs no tokenizer. Then tokenize, and check that rewards can score them."""
    train_source = config.data.train if given.train_data is None else given.train_data
    eval_source = config.data.eval if given.eval_data is None else given.eval_data
    train_rows = read_rows(train_source)
    check_rows(train_rows, config.data)
    # A program's own data is there for evaluations that its watcher asks for.
    eval_rows = read_rows(eval_source) if config.eval.every or given.eval_data is not None else None
    if eval_rows is not None:
        check_rows(eval_rows, config.data)
    tokenizer = given.loaded.tokenizer if given.loaded is not None else load_tokenizer(config.model)
    data = _Data(
        train=load_prompts(train_rows, config.data, tokenizer),
        eval=None if eval_rows is None else load_prompts(eval_rows, config.data, tokenizer, limit=config.eval.limit),
        tokenizer=tokenizer,
    )
    scorer.check_prompts(data.train.prompts)
    if data.eval is not None:
        scorer.check_prompts(data.eval.prompts)
    return data


def _describe(data: _Data, config: Config) -> None:
    """What there is to learn from and to evaluate on; with warnings where some of it does not act."""
    for name, found in (("training", data.train), ("evaluation", data.eval)):
        if found is not None and found.prompts:
            level = logging.WARNING if found.num_too_long else logging.INFO
            logger.log(level, "%s data: %s", name, found.describe())
    if remark := sampling_remark(config):
        logger.warning(remark)


def _num_steps(config: Config, num_prompts: int) -> int:
    if config.train.steps is not None:
        return config.train.steps
    return max(1, math.ceil(config.train.epochs * num_prompts / config.rollout.prompts_per_step))


def _output(config: Config) -> Path:
    if config.train.output:
        return Path(config.train.output)
    model = Path(config.model.path).name or "model"
    data = Path(config.data.train).stem or "data"
    return Path("runs") / f"{model}-{data}"


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


def _sampler(config: Config, data: _Data, start: Start) -> PromptSampler:
    return PromptSampler(
        data.train.prompts,
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
    return Buffer(
        prompts_per_step=config.rollout.prompts_per_step, max_off_policy_steps=config.train.max_off_policy_steps
    )


def _trackers(config: Config, run: RunDirectory, *, steps: int, start: Start, accuracy_of: str) -> Trackers:
    return build_trackers(
        config.tracking,
        run_name=run.path.name,
        total_steps=steps,
        resumed_step=start.step,
        accuracy_of=accuracy_of,
    )


def _counted(data: _Data, scorer: RewardScorer) -> str:
    """The reward that accuracy counts, with a warning where another weighs more."""
    if data.eval is None:
        return ""
    sources = dict.fromkeys(prompt.data_source for prompt in data.eval.prompts)
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
    reference, alpha = policy.reference, config.algorithm.reference_mixup
    if reference is None or alpha is None:
        return Upkeep(entropy=adaptive, sync=None)
    return Upkeep(entropy=adaptive, sync=ReferenceSync(reference, config.algorithm.reference_sync_every, alpha))


def _evaluator(config: Config, given: Given, data: _Data, engine: Engine, *, reports: Reports) -> Evaluator:
    """With a scorer of its own, so that training's reward metrics hold training's rewards alone."""
    return Evaluator(
        engine,
        () if data.eval is None else data.eval.prompts,
        scorer=_scorer(config, given),
        config=config.eval,
        sampling=eval_sampling(config.eval, config.rollout, seed=config.train.seed),
        on_report=reports.add,
    )


def _empty_steps(config: Config) -> EmptySteps:
    where = _WHERE if config.train.trajectories else ""
    return EmptySteps(config.train.stop_after_empty_steps, remedy=_REMEDY + where)
