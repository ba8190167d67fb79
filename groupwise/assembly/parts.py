"""A training run's parts from its config: samples or worked answers in, a better model out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from groupwise.assembly.preparation import Prepared
from groupwise.assembly.record import Reports
from groupwise.assembly.supervised import PreparedSft
from groupwise.checkpoint.saver import Saver
from groupwise.config import Config
from groupwise.config.algorithm import MovingReference
from groupwise.data import PromptSampler, PromptSet
from groupwise.doctor import Doctor, build_rules
from groupwise.empty_steps import EmptySteps
from groupwise.evaluation.counted import counted_remarks, counted_rewards
from groupwise.evaluation.evaluator import Evaluator, NoEvaluation
from groupwise.files import append_rows
from groupwise.interrupt import StopRequest
from groupwise.lock import FolderLock
from groupwise.model.loading import load_model
from groupwise.placement import InProcess
from groupwise.policy import LocalPolicy
from groupwise.policy.upkeep import AdaptiveEntropy, ReferenceSync, Upkeep
from groupwise.protocols import EngineCaps, Policy, Stateful
from groupwise.resume import Identity, Start
from groupwise.rewards import RewardScorer
from groupwise.rollout import Buffer, LogprobPass, Producer, Selection
from groupwise.rollout.batch import BatchShape, teaches
from groupwise.rollout.episode import Sample, sampled_by
from groupwise.rollout.sampling import eval_sampling, training_sampling
from groupwise.rollout.source import GroupSource
from groupwise.rundir import RunDirectory
from groupwise.sft import SupervisedLoss, SupervisedSource
from groupwise.tracking import Trackers, build_trackers
from groupwise.train import TrainParts
from groupwise.types import RolloutGroup
from groupwise.watching import Watcher
from groupwise.weight_sync import Unsynced

logger = logging.getLogger(__name__)

_REMEDY = "Mend what it names: the reward, the columns that it reads, or the limits on completions"
_WHERE = ". Every sample is in trajectories/ with its text and cause"
_SFT_LINES_EVERY = 5.0  # seconds: its steps are many and short, and each says little
_SFT_REMEDY = "Raise sft.max_tokens, or look at the rows: each needs an answer within it"


@dataclass(frozen=True, slots=True)
class Opened:
    """The run directory, held by this process, what is in it, and what ends with the run."""

    run: RunDirectory
    start: Start
    identity: Identity
    lock: FolderLock
    stop: StopRequest
    watcher: Watcher

    def saver(
        self, parts: Mapping[str, Stateful], config: Config, *, best: Callable[[], int | None] = lambda: None
    ) -> Saver:
        """Saves these parts.

        Args:
            best: the step of the best evaluation.
        """
        return Saver(
            self.run.checkpoints,
            parts,
            config.train,
            record=self.identity,
            confirm=self.lock.confirm,
            saved=self.watcher.saved,
            best=best,
        )


def assemble_rl(
    ready: Prepared, opened: Opened, placement: InProcess, *, judge: RewardScorer, reports: Reports
) -> TrainParts:
    """Every component of a run that samples and rewards.

    Args:
        judge: scores evaluations.
    """
    config, steps = ready.config, ready.steps
    policy = _policy(ready, placement)
    engine = placement.engine(policy, length=_longest(ready))
    sample, buffer = sampled_by(engine), _buffer(config)
    learned = sampled_by(engine, learns=True)
    producer = _producer(ready, _sampler(config, ready.train, opened.start), learned, buffer=buffer)
    upkeep = _upkeep(ready, policy)
    evaluator = _evaluator(ready, sample, scorer=judge, reports=reports)
    empty = _empty_steps(config)
    doctor = _doctor(config, opened.run, eval_rows=0 if ready.eval is None else len(ready.eval.prompts))
    saved: dict[str, Stateful] = {
        "policy": policy,
        "upkeep": upkeep,
        "producer": producer,
        "buffer": buffer,
        "evaluator": evaluator,
        "reports": reports,
        "empty": empty,
        "doctor": doctor,
    }
    return TrainParts(
        config=config,
        policy=policy,
        upkeep=upkeep,
        source=_source(ready, producer, buffer, logprobs=_logprobs(ready, policy, engine.caps)),
        weight_sync=placement.sync(policy, engine, prompts=ready.train.prompts),
        evaluator=evaluator,
        trackers=_trackers(config, opened, steps=steps, accuracy_of=_counted(ready.eval, ready.scorer)),
        saver=opened.saver(saved, config, best=lambda: evaluator.best.step),
        run=opened.run,
        num_steps=steps,
        empty=empty,
        doctor=doctor,
        stop=opened.stop,
        watcher=opened.watcher,
    )


def assemble_sft(ready: PreparedSft, opened: Opened, placement: InProcess) -> tuple[TrainParts, SupervisedSource]:
    """Every component of a supervised run: the same policy and loop, and no engine; and its source, which has the
    last loss."""
    config = ready.config
    objective = SupervisedLoss(router_aux_loss_coef=config.algorithm.router_aux_loss_coef)
    policy = placement.policy(objective, updates=ready.steps, supervised=True)
    source = SupervisedSource(ready.data.rows, config)
    empty = EmptySteps(config.train.stop_after_empty_steps, remedy=_SFT_REMEDY)
    doctor = _doctor(config, opened.run, supervised=True)
    saved: dict[str, Stateful] = {"policy": policy, "progress": source, "empty": empty, "doctor": doctor}
    parts = TrainParts(
        config=config,
        policy=policy,
        upkeep=Upkeep(entropy=None, sync=None),
        source=source,
        weight_sync=Unsynced(),
        evaluator=NoEvaluation(),
        trackers=_trackers(config, opened, steps=ready.steps, lines_every=_SFT_LINES_EVERY),
        saver=opened.saver(saved, config),
        run=opened.run,
        num_steps=ready.steps,
        empty=empty,
        doctor=doctor,
        stop=opened.stop,
        watcher=opened.watcher,
    )
    return parts, source


def _policy(ready: Prepared, placement: InProcess) -> LocalPolicy:
    """What learns, with the teacher that it may have."""
    return placement.policy(
        ready.algorithm,
        updates=ready.steps * ready.config.optim.updates_per_batch,
        temperature=ready.config.rollout.temperature,
        teacher=None if ready.teacher is None else load_model(ready.teacher),
    )


def _source(ready: Prepared, producer: Producer, buffer: Buffer, *, logprobs: LogprobPass) -> GroupSource:
    """What makes a step's batch of the groups that are sampled."""
    weights = ready.scorer.weights | ready.environments.weights
    keep = partial(teaches, algorithm=ready.algorithm, reward_weights=weights)
    return GroupSource(
        ready.algorithm,
        producer,
        buffer,
        _selection(ready.config, buffer, producer, keep=keep),
        logprobs,
        ready.scorer,
        _shape(ready.config),
        weights,
    )


def _longest(ready: Prepared) -> int:
    """Tokens of the longest prompt and completion that the run may have."""
    config, held_out = ready.config, () if ready.eval is None else ready.eval.prompts
    most = max(training_sampling(config).max_tokens, eval_sampling(config).max_tokens if held_out else 0)
    return most + max(len(prompt.token_ids) for prompt in (*ready.train.prompts, *held_out))


def _sampler(config: Config, data: PromptSet, start: Start) -> PromptSampler:
    return PromptSampler(
        data.prompts,
        seed=config.train.seed,
        shuffle=config.data.shuffle,
        same_data=not start.changes,  # or the difference was accepted
    )


def _producer(ready: Prepared, sampler: PromptSampler, sample: Sample, *, buffer: Buffer) -> Producer:
    return Producer(
        sample,
        ready.scorer,
        ready.environments,
        sampler,
        buffer,
        sampling=training_sampling(ready.config),
        group_size=ready.config.rollout.group_size,
        total_steps=ready.steps,
    )


def _buffer(config: Config) -> Buffer:
    return Buffer(prompts_per_step=config.rollout.prompts_per_step, max_off_policy_steps=0)


def _shape(config: Config) -> BatchShape:
    return BatchShape(
        config.optim.steps_per_batch,
        config.rollout.max_completion_tokens,
        config.optim.passes_per_batch,
    )


def _trackers(
    config: Config, opened: Opened, *, steps: int, accuracy_of: str = "", lines_every: float = 0.0
) -> Trackers:
    return build_trackers(
        config.tracking,
        run_name=opened.run.path.name,
        total_steps=steps,
        resumed_step=opened.start.step,
        accuracy_of=accuracy_of,
        lines_every=lines_every,
    )


def _counted(held_out: PromptSet | None, scorer: RewardScorer) -> str:
    """The reward that accuracy counts, with a warning where another weighs more."""
    if held_out is None:
        return ""
    sources = dict.fromkeys(prompt.data_source for prompt in held_out.prompts)
    for remark in counted_remarks(scorer, sources):
        logger.warning(remark)
    return counted_rewards(scorer, sources)


def _selection(
    config: Config, buffer: Buffer, producer: Producer, *, keep: Callable[[RolloutGroup], bool]
) -> Selection:
    rollout = config.rollout
    return Selection(
        buffer, producer, prompts_per_step=rollout.prompts_per_step, cap=rollout.dynamic_sampling_cap, teaches=keep
    )


def _logprobs(ready: Prepared, policy: Policy, caps: EngineCaps) -> LogprobPass:
    old = ready.config.recomputes_logprobs(exact=caps.exact_logprobs) or not caps.logprobs
    return LogprobPass(policy, ready.algorithm, old=old, stands_in=not caps.logprobs)


def _upkeep(ready: Prepared, policy: LocalPolicy) -> Upkeep:
    algorithm, moves = ready.algorithm, ready.config.algorithm.reference
    control = algorithm.entropy_control
    adaptive = None if control is None else AdaptiveEntropy(algorithm.entropy_coef, control)
    if policy.reference is None or not isinstance(moves, MovingReference):
        return Upkeep(entropy=adaptive, sync=None)
    return Upkeep(entropy=adaptive, sync=ReferenceSync(policy, policy.reference, moves.sync_every, moves.mixup))


def _evaluator(ready: Prepared, sample: Sample, *, scorer: RewardScorer, reports: Reports) -> Evaluator:
    """With a scorer of its own, so that training's reward metrics hold training's rewards alone."""
    config = ready.config
    return Evaluator(
        sample,
        () if ready.eval is None else ready.eval.prompts,
        scorer=scorer,
        environments=ready.environments,
        config=config.eval,
        sampling=eval_sampling(config),
        on_report=reports.add,
        keep_best=config.train.keep_best,
    )


def _empty_steps(config: Config) -> EmptySteps:
    where = _WHERE if config.train.trajectories else ""
    return EmptySteps(config.train.stop_after_empty_steps, remedy=_REMEDY + where)


def _doctor(config: Config, run: RunDirectory, *, eval_rows: int = 0, supervised: bool = False) -> Doctor:
    return Doctor(
        build_rules(config, eval_rows=eval_rows, supervised=supervised),
        stop_on=config.train.stop_on,
        kept=config.train.doctor.flat_steps,
        record=lambda finding: append_rows(run.findings_file, [finding]),
    )
