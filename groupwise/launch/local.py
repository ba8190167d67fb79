"""Everything in this process: build the parts of a run from its config, and call the loop."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from groupwise.algorithms import Algorithm, build_algorithm
from groupwise.checkpoint import find_latest, load_checkpoint
from groupwise.config import Config
from groupwise.config.checks import check_trainable, sampling_remark
from groupwise.data import PromptSampler, PromptSet, check_rows, load_prompts, read_rows
from groupwise.data.files import Source
from groupwise.engines import build_engine, check_engine
from groupwise.errors import CheckpointError
from groupwise.evaluation.evaluator import Evaluator, eval_sampling
from groupwise.evaluation.report import EvalReport
from groupwise.files import append_rows, write_json_atomic
from groupwise.interrupt import catch_interrupts
from groupwise.launch.watching import GuardedWatcher
from groupwise.model.loading import LoadedModel, given_or_loaded, load_tokenizer, prepare_device, with_adapter
from groupwise.policy import Objective, Policy
from groupwise.policy.bundle import BundleWriter
from groupwise.policy.upkeep import AdaptiveEntropy, ReferenceSync, Upkeep
from groupwise.rewards import RewardScorer
from groupwise.rollout import Buffer, LogprobPass, Producer, Selection
from groupwise.rollout.batch import teaches
from groupwise.rundir import RunDirectory, check_place
from groupwise.tracking import Trackers, build_trackers, check_backends
from groupwise.train import TrainParts, train
from groupwise.types import Engine, RolloutGroup, SamplingParams, Unwatched, Watcher
from groupwise.weight_sync import InProcessSync

logger = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Given:
    """What a Python program hands over as objects instead of naming it in the config.

    Attributes:
        loaded: instead of `model.path`.
        train_data, eval_data: instead of `data.train` and `data.eval`: a `datasets.Dataset`, or rows.
        rewards: functions beside those in the config, with `reward_weights` (all 1 when empty) and `reward_extras`,
            objects of the program's own for those that name them.
        watcher: follows the run, and may end it.
    """

    loaded: LoadedModel | None = None
    train_data: Source | None = None
    eval_data: Source | None = None
    rewards: Sequence[Callable[..., Any]] = ()
    reward_weights: Sequence[float] = ()
    reward_extras: Mapping[str, Any] = field(default_factory=dict)
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


@dataclass(slots=True)
class _Reports:
    """Evaluations of one run, first to last; their rows go to trajectories."""

    run: RunDirectory
    summaries: list[dict[str, Any]] = field(default_factory=list)

    def add(self, step: int, report: EvalReport) -> None:
        self.summaries.append({"step": step, **report.summary()})
        append_rows(self.run.trajectories / f"eval_{step:06d}.jsonl", report.records())


def run_training(
    config: Config, *, resume: bool = False, overwrite: bool = False, given: Given | None = None
) -> dict[str, Any]:
    """Train as `config` says, from data to `final/`; returns what `summary.json` holds.

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
    steps = _num_steps(config, len(data.train.prompts))
    check_place(_output(config), resume=resume, overwrite=overwrite)
    loaded = with_adapter(given_or_loaded(given.loaded, config.model), config.lora, seed=config.train.seed)
    run = RunDirectory.create(_output(config), resume=resume, overwrite=overwrite)
    run.record(config)
    with run.logging(), catch_interrupts() as stop, closing(scorer), closing(_scorer(config, given)) as judge:
        logger.info("training data: %s", data.train.describe())
        if remark := sampling_remark(config):
            logger.warning(remark)
        adaptive = None if algorithm.entropy_control is None else AdaptiveEntropy(algorithm, algorithm.entropy_control)
        policy = _policy(config, loaded, adaptive or algorithm, run=run, steps=steps)
        engine = build_engine(config.rollout, loaded, reserved_bytes=policy.bytes_to_come)
        reports = _Reports(run)
        buffer = _buffer(config)
        producer = _producer(config, data, engine, scorer, buffer=buffer, steps=steps)
        keep = partial(teaches, algorithm=algorithm, reward_weights=scorer.weights)
        parts = TrainParts(
            config=config,
            algorithm=algorithm,
            policy=policy,
            upkeep=_upkeep(config, policy, adaptive),
            producer=producer,
            buffer=buffer,
            selection=_selection(config, buffer, producer, keep=keep),
            logprobs=_logprobs(config, policy, algorithm),
            scorer=scorer,
            weight_sync=InProcessSync(policy, engine),
            evaluator=_evaluator(config, data, engine, scorer=judge, reports=reports),
            trackers=_trackers(config, run, steps=steps),
            run=run,
            num_steps=steps,
            stop=stop,
            watcher=GuardedWatcher(given.watcher or Unwatched()),
        )
        try:
            done = run_async(_run(parts))
            policy.save_pretrained(run.final)
        finally:
            policy.release()
        summary = _summary(config, reports, steps=done, seconds=time.perf_counter() - started)
        write_json_atomic(run.summary_file, summary)
    return summary


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


async def _run(parts: TrainParts) -> int:
    start = _restore(parts) if parts.run.resumed else 0
    parts.trackers.start(parts.config.model_dump(mode="json"), parts.run.path)
    try:
        return await train(parts, start=start)
    finally:
        parts.trackers.close()
        await parts.producer.close()


def _restore(parts: TrainParts) -> int:
    """Load the newest checkpoint, and forget what was written after it."""
    latest = find_latest(parts.run.checkpoints)
    if latest is None:
        raise CheckpointError(f"{parts.run.checkpoints} holds no complete checkpoint; start again with --overwrite")
    step = load_checkpoint(latest, parts.stateful)
    parts.producer.rewind(parts.buffer.next_index)
    parts.run.truncate_after(step)
    logger.info("resumed from %s", latest)
    return step


def _resumed_step(run: RunDirectory) -> int | None:
    from groupwise.checkpoint.store import step_of

    latest = find_latest(run.checkpoints) if run.resumed else None
    return None if latest is None else step_of(latest)


def _scorer(config: Config, given: Given) -> RewardScorer:
    return RewardScorer(
        config.reward,
        functions=given.rewards,
        function_weights=given.reward_weights,
        extras=given.reward_extras,
    )


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
    )
    stop = () if config.rollout.min_completion_tokens else config.rollout.stop  # before those, none ends an answer
    scorer.check_prompts(data.train.prompts, stop=stop, tokenizer=tokenizer)
    if data.eval is not None:
        scorer.check_prompts(data.eval.prompts, stop=stop)
    return data


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


def _producer(
    config: Config, data: _Data, engine: Engine, scorer: RewardScorer, *, buffer: Buffer, steps: int
) -> Producer:
    sampler = PromptSampler(data.train.prompts, seed=config.train.seed, shuffle=config.data.shuffle)
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


def _trackers(config: Config, run: RunDirectory, *, steps: int) -> Trackers:
    return build_trackers(config.tracking, run_name=run.path.name, total_steps=steps, resumed_step=_resumed_step(run))


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


def _evaluator(config: Config, data: _Data, engine: Engine, *, scorer: RewardScorer, reports: _Reports) -> Evaluator:
    """With a scorer of its own, so that training's reward metrics hold training's rewards alone."""
    return Evaluator(
        engine,
        () if data.eval is None else data.eval.prompts,
        scorer=scorer,
        config=config.eval,
        sampling=eval_sampling(config.eval, config.rollout, seed=config.train.seed),
        on_report=reports.add,
    )


def _summary(config: Config, reports: _Reports, *, steps: int, seconds: float) -> dict[str, Any]:
    summary: dict[str, Any] = {"steps": steps, "seconds": round(seconds, 1), "seed": config.train.seed}
    if reports.summaries:
        summary["eval"] = reports.summaries
    return summary
