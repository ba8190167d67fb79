"""THE loop, read top to bottom. The only file that knows every component; `groupwise.launch` puts them together.

producer --> buffer --> selection --P groups--> batch --> policy --version--> weight_sync --> engine --> producer
                                                            `--> checkpoint, trackers, trajectories, ledger
"""

from __future__ import annotations

from dataclasses import dataclass

from groupwise import metrics
from groupwise.algorithms.base import Algorithm
from groupwise.checkpoint.saver import Saver
from groupwise.clock import Clock
from groupwise.config import Config
from groupwise.empty_steps import EmptySteps
from groupwise.errors import Interrupted
from groupwise.evaluation.evaluator import Evaluator
from groupwise.files import append_rows
from groupwise.interrupt import StopRequest, interrupted
from groupwise.metrics import Last, Metric, Metrics
from groupwise.policy import Policy
from groupwise.policy.upkeep import Upkeep
from groupwise.rewards import RewardScorer
from groupwise.rollout import Buffer, LogprobPass, Producer, Selection, build_batch
from groupwise.rollout.batch import BatchShape, usable_samples
from groupwise.rollout.records import ledger_rows, trajectory_rows
from groupwise.rundir import RunDirectory
from groupwise.tracking import Trackers
from groupwise.trajectories import to_json
from groupwise.types import TrainingBatch
from groupwise.watching import Watcher, Wish
from groupwise.weight_sync import InProcessSync


@dataclass(frozen=True, slots=True)
class TrainParts:
    """Every component of one run, made by a launcher.

    Attributes:
        num_steps: training steps of the whole run, those before a resume included.
        empty: judges steps without one usable sample.
        stop: becomes true when the user asks the run to end.
        watcher: follows the run, and may end it.
    """

    config: Config
    algorithm: Algorithm
    policy: Policy
    upkeep: Upkeep
    producer: Producer
    buffer: Buffer
    selection: Selection
    logprobs: LogprobPass
    scorer: RewardScorer
    weight_sync: InProcessSync
    evaluator: Evaluator
    trackers: Trackers
    saver: Saver
    run: RunDirectory
    num_steps: int
    empty: EmptySteps
    stop: StopRequest
    watcher: Watcher


async def train(parts: TrainParts, *, start: int = 0) -> int:
    """Train from step `start` to `parts.num_steps`, or to where the watcher ends the run; returns the last step.

    Raises:
        Interrupted: the user asked to stop; the step was finished and a checkpoint saved.
        TrainingError: too many steps in a row had not one usable sample; everything of them is written.
    """
    weights = parts.scorer.weights
    shape = BatchShape(
        parts.config.optim.steps_per_batch,
        parts.config.train.micro_batch_tokens,
        parts.config.rollout.max_completion_tokens,
        parts.config.optim.passes_per_batch,
        parts.policy.lanes.count,
    )
    await parts.weight_sync.publish(start)
    if scores := await parts.evaluator.maybe_run(start):
        _log(parts, start, scores)
    parts.producer.admit(start)
    for step in range(start, parts.num_steps):
        parts.watcher.begins(step + 1, parts.num_steps)
        clock = Clock()
        with clock("rollout"):
            chosen = await parts.selection.take(step)
        with clock("train"):
            groups = parts.logprobs.add(chosen.groups)
        batch = build_batch(groups, parts.algorithm, shape=shape, reward_weights=weights, dropped=chosen.dropped)
        learned: list[Metrics] = []
        for minibatch in batch.minibatches:
            with clock("train"):
                learned += parts.policy.learn(minibatch.microbatches, minibatch.denominators)
                await parts.weight_sync.wait()
                learned.append(parts.policy.optim_step())
        learned.append(parts.upkeep.after(step + 1, learned))
        learned.append(parts.empty.after(step + 1, usable_samples((*groups, *chosen.dropped), parts.algorithm)))
        _record(parts, batch, step + 1)
        parts.trackers.samples(step + 1, batch)
        await parts.weight_sync.publish(step + 1)
        asked = parts.watcher.updated(step + 1)
        with clock("eval"):
            scores = await parts.evaluator.maybe_run(step + 1, final=step + 1 == parts.num_steps, asked=asked)
        stopping = bool(parts.stop)  # read once: a request that comes after the save must wait for the next one
        sampled = (chosen.metrics, batch.metrics, parts.scorer.metrics(), parts.buffer.metrics())
        found = metrics.merge(*sampled, *learned, scores)
        wish = _log(parts, step + 1, found | clock.metrics() | _throughput(batch, clock))
        last = wish.stop or step + 1 == parts.num_steps
        parts.saver.after(step + 1, now=last or stopping or wish.save)
        parts.empty.check(step + 1, last=last)
        if last:
            return step + 1
        if stopping:
            raise Interrupted(interrupted(parts.run.path, step + 1))
        parts.producer.admit(step + 1)
    return parts.num_steps


def _log(parts: TrainParts, step: int, found: Metrics) -> Wish:
    numbers = metrics.resolve(found)
    parts.trackers.log(step, numbers)
    return parts.watcher.logged(step, numbers)


def _record(parts: TrainParts, batch: TrainingBatch, step: int) -> None:
    if parts.config.train.trajectories:
        append_rows(parts.run.trajectory_file(step), map(to_json, trajectory_rows(batch, step=step)))
    parts.run.append_ledger(ledger_rows(batch.groups, step=step, dropped=batch.dropped))


def _throughput(batch: TrainingBatch, clock: Clock) -> dict[str, Metric]:
    groups = (*batch.groups, *batch.dropped)
    sampled = sum(len(rollout.token_ids) for group in groups for rollout in group.rollouts)
    return {"throughput/tokens_per_second": Last(sampled / clock.elapsed)}
