"""THE loop, read top to bottom. The only file that knows every component; `groupwise.assembly` puts them together.

source --batch--> policy --version--> weight_sync --> engine --> source
   |                 `--> checkpoint, trackers, trajectories, ledger
   `-- sampled groups (`rollout/source.py`): producer --> episodes --> buffer --> selection
   `-- worked answers (`sft.py`)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from groupwise import metrics
from groupwise.batches import TrainingBatch
from groupwise.checkpoint.saver import Saver
from groupwise.clock import Clock
from groupwise.config import Config
from groupwise.doctor import Doctor
from groupwise.empty_steps import EmptySteps, Usable
from groupwise.errors import Interrupted
from groupwise.evaluation.evaluator import Evaluation
from groupwise.files import append_rows
from groupwise.interrupt import StopRequest, interrupted
from groupwise.metrics import Last, Metric, Metrics
from groupwise.policy.upkeep import Upkeep
from groupwise.protocols import Policy, WeightSync
from groupwise.rollout.records import ledger_rows, trajectory_rows
from groupwise.rundir import RunDirectory
from groupwise.tracking import Trackers
from groupwise.watching import Watcher, Wish
from groupwise.wishes import take_wishes


class BatchSource(Protocol):
    """Where a step's batch comes from."""

    def admit(self, version: int) -> None:
        """`version` is the newest: what it may sample can begin."""
        ...

    async def take(self, step: int, clock: Clock) -> TrainingBatch:
        """The batch of `step` (from 0); the seconds of its phases go to the clock."""
        ...

    def usable(self, batch: TrainingBatch) -> Usable:
        """How much of it could be learned from."""
        ...

    def metrics(self) -> Metrics:
        """Its own, since the last call."""
        ...

    def note(self, numbers: Mapping[str, float]) -> None:
        """What was logged of the step."""
        ...

    def resumed(self) -> None:
        """Called once its state is loaded from a checkpoint."""
        ...

    async def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class TrainParts:
    """Every component of one run, made by `groupwise.assembly`.

    Attributes:
        num_steps: training steps of the whole run, those before a resume included.
        empty: judges steps without one usable sample.
        doctor: looks at every step, and may end the run.
        stop: becomes true when the user asks the run to end.
        watcher: follows the run, and may end it.
    """

    config: Config
    policy: Policy
    upkeep: Upkeep
    source: BatchSource
    weight_sync: WeightSync
    evaluator: Evaluation
    trackers: Trackers
    saver: Saver
    run: RunDirectory
    num_steps: int
    empty: EmptySteps
    doctor: Doctor
    stop: StopRequest
    watcher: Watcher


async def train(parts: TrainParts, *, start: int = 0) -> int:
    """Train from step `start` to `parts.num_steps`, or to where the watcher ends the run; returns the last step.

    Raises:
        Interrupted: the user asked to stop; the step was finished and a checkpoint saved.
        TrainingError: too many steps in a row had not one usable sample, or a rule of `train.stop_on` saw something;
            everything of them is written.
    """
    take_wishes(parts.run.path)  # of the run before this one
    await parts.weight_sync.publish(start)
    if scores := await parts.evaluator.maybe_run(start):
        _log(parts, start, scores)
    parts.source.admit(start)
    for step in range(start, parts.num_steps):
        parts.watcher.begins(step + 1, parts.num_steps)
        clock = Clock()
        batch = await parts.source.take(step, clock)
        await parts.weight_sync.rest()
        learned: list[Metrics] = []
        for minibatch in batch.minibatches:
            with clock("train"):
                learned += await parts.policy.learn(minibatch, parts.upkeep.knobs)
                await parts.weight_sync.wait()
                learned.append(await parts.policy.optim_step())
        learned.append(await parts.upkeep.after(step + 1, learned))
        learned.append(parts.empty.after(step + 1, parts.source.usable(batch)))
        _record(parts, batch, step + 1)
        learned.append(parts.weight_sync.metrics())  # of the version that drew the step
        await parts.weight_sync.publish(step + 1)
        asked = parts.watcher.updated(step + 1)
        with clock("eval"):
            scores = await parts.evaluator.maybe_run(step + 1, final=step + 1 == parts.num_steps, asked=asked)
        beside = take_wishes(parts.run.path)
        stopping = bool(parts.stop) or "stop" in beside  # read once: what comes after the save waits for the next one
        found = metrics.merge(batch.metrics, parts.source.metrics(), *learned, scores)
        wish = _log(parts, step + 1, found | clock.metrics() | _throughput(batch, clock), batch)
        last = wish.stop or step + 1 == parts.num_steps
        parts.saver.after(step + 1, now=last or stopping or wish.save or "save" in beside or parts.doctor.stops)
        parts.empty.check(step + 1, last=last)
        parts.doctor.check(step + 1, run=parts.run.path)
        if last:
            return step + 1
        if stopping:
            raise Interrupted(interrupted(parts.run.path, step + 1))
        parts.source.admit(step + 1)
    return parts.num_steps


def _log(parts: TrainParts, step: int, found: Metrics, batch: TrainingBatch | None = None) -> Wish:
    numbers = metrics.resolve(found)
    parts.source.note(numbers)
    parts.trackers.log(step, numbers)
    parts.doctor.after(step, numbers, () if batch is None else (*batch.groups, *batch.dropped))
    return parts.watcher.logged(step, numbers)


def _record(parts: TrainParts, batch: TrainingBatch, step: int) -> None:
    """What was sampled for the step; nothing where nothing was."""
    if not (batch.groups or batch.dropped):
        return
    if parts.config.train.trajectories:
        append_rows(parts.run.trajectory_file(step), trajectory_rows(batch, step=step))
    parts.run.append_ledger(ledger_rows(batch.groups, step=step, dropped=batch.dropped))
    parts.trackers.samples(step, batch)


def _throughput(batch: TrainingBatch, clock: Clock) -> dict[str, Metric]:
    groups = (*batch.groups, *batch.dropped)
    sampled = sum(rollout.num_written for group in groups for rollout in group.rollouts)
    return {"throughput/tokens_per_second": Last(sampled / clock.elapsed)} if groups else {}
