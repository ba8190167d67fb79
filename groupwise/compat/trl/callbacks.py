"""What a run tells transformers' callbacks, and TRL's `state.log_history`."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback, TrainerControl, TrainerState
from transformers.trainer_utils import TrainOutput

from groupwise.compat.trl.arguments import Arguments
from groupwise.compat.trl.translate import Batch
from groupwise.errors import ConfigError
from groupwise.watching import Wish

logger = logging.getLogger(__name__)

_LAST = ("learning_rate",)
_NAMES = {
    "time/step": "step_time",
    **{f"eval/{what}": f"eval_completions/{what}" for what in ("mean_length", "min_length", "max_length")},
    "eval/clipped_ratio": "eval_completions/clipped_ratio",
}
"""Metrics that TRL calls otherwise."""

_TERMINATED = tuple(f"completions/{what}_terminated_length" for what in ("mean", "min", "max"))


class ConfigDecides(DefaultFlowCallback):
    """In the place of transformers' own flow, which asks for logs, evaluations and checkpoints at steps of its own."""

    def on_step_end(self, args: Any, state: Any, control: Any, **objects: Any) -> TrainerControl:
        return control

    def on_epoch_end(self, args: Any, state: Any, control: Any, **objects: Any) -> TrainerControl:
        return control


@dataclass(frozen=True, slots=True)
class Course:
    """What a run goes through.

    Attributes:
        num_rows, num_eval_rows: of the data; without evaluation rows nothing can be evaluated.
        metrics_file: `metrics.jsonl` of its directory.
    """

    batch: Batch
    num_rows: int
    num_eval_rows: int
    metrics_file: Path

    def epoch(self, step: int) -> float:
        return step * self.batch.size / self.num_rows


@dataclass(frozen=True, slots=True)
class Hooks:
    """Methods of the trainer that a subclass may override, and that the run calls where transformers would.

    Attributes:
        log: gets each log, and hands it on to `CallbackWatcher.tell`.
        save: a checkpoint of this step is complete.
    """

    log: Callable[[dict[str, float]], None]
    save: Callable[[int], None]


class CallbackWatcher:
    """Follows a run for the callbacks of its trainer; one that asks for the end, a checkpoint or an evaluation gets it.

    Args:
        handler: transformers' own.
    """

    def __init__(
        self, args: Arguments, handler: CallbackHandler, *, state: TrainerState, course: Course, hooks: Hooks
    ) -> None:
        self._args: Any = args  # callbacks ask for TrainingArguments, and read its attributes
        self._hooks = hooks
        self._handler, self._state, self._course = handler, state, course
        self.control = TrainerControl()
        self._since: list[Mapping[str, float]] = []
        self._losses: list[float] = []  # what is not finite has no place in a mean
        self._done = 0
        self._tokens = 0.0
        self._num_steps = 0
        self._reported: dict[str, list[float]] = {}
        self._started = time.perf_counter()

    def initialised(self) -> None:
        """The trainer is complete."""
        self.control = self._handler.on_init_end(self._args, self._state, self.control)

    def report(self, name: str, value: float) -> None:
        """A number that a reward function logs by `log_metric`."""
        self._reported.setdefault(name, []).append(float(value))

    def begins(self, step: int, num_steps: int) -> None:
        first = not self._num_steps
        if first:
            self._begin(step - 1, num_steps)
        if first or self._ends_epoch(step - 1):
            self.control = self._handler.on_epoch_begin(self._args, self._state, self.control)
        self.control = self._handler.on_step_begin(self._args, self._state, self.control)

    def updated(self, step: int) -> bool:
        self._count(step)
        self.control = self._handler.on_step_end(self._args, self._state, self.control)
        if self._ends_epoch(step) or step == self._num_steps or self.control.should_training_stop:
            self.control = self._handler.on_epoch_end(self._args, self._state, self.control)
        if self.control.should_epoch_stop:
            logger.warning("a callback set should_epoch_stop, which ends no epoch here; set should_training_stop")
            self.control.should_epoch_stop = False
        if self.control.should_evaluate and not self._course.num_eval_rows:
            raise ConfigError("a callback set should_evaluate, and the trainer has no eval_dataset; give it one")
        return self.control.should_evaluate

    def logged(self, step: int, metrics: Mapping[str, float]) -> Wish:
        own, evaluation = _parted(metrics)
        if own:
            self._collect(own)
            if self.control.should_log or self._is_due(step):
                self._log(self._collected())
        if evaluation:
            self.evaluated(evaluation, seconds=metrics.get("time/eval"))
        return Wish(save=self.control.should_save, stop=bool(own) and self.control.should_training_stop)

    def saved(self, step: int) -> None:
        self._hooks.save(step)
        self.control = self._handler.on_save(self._args, self._state, self.control)

    def evaluated(
        self, metrics: Mapping[str, float], *, seconds: float | None = None, prefix: str = "eval"
    ) -> dict[str, float]:
        """Log an evaluation's `eval/…` numbers under TRL's names; returns them."""
        logs = {name.replace("eval", prefix, 1): value for name, value in self._named(metrics, seconds).items()}
        self._log(logs)
        self.control = self._handler.on_evaluate(self._args, self._state, self.control, metrics=dict(logs))
        return logs

    def ended(self, summary: Mapping[str, Any]) -> TrainOutput:
        """The run's last log, and what `train` returns.

        Args:
            summary: of the run; one that had no step left to do was resumed at its end.
        """
        if not self._num_steps:
            self._begin(summary["steps"], summary["steps"])
        seconds, done, batch = time.perf_counter() - self._started, self._done, self._course.batch
        loss = math.nan if done and not self._losses else math.fsum(self._losses) / max(1, len(self._losses))
        logs = {
            "train_runtime": round(seconds, 4),
            "train_samples_per_second": round(done * batch.size / seconds, 3),
            "train_steps_per_second": round(done * batch.updates / seconds, 3),
            "total_flos": float(self._state.total_flos),
            "train_loss": loss,
        }
        self._log(logs)
        self._handler.on_train_end(self._args, self._state, self.control)
        return TrainOutput(self._state.global_step, loss, logs)

    def _begin(self, done: int, num_steps: int) -> None:
        """Before the first step; `done` of them were done before the run was resumed."""
        state, updates = self._state, self._course.batch.updates
        self._num_steps, state.max_steps = num_steps, num_steps * updates
        if self._args.logging_steps < 1:  # a part of all steps
            state.logging_steps = max(1, math.ceil(self._args.logging_steps * state.max_steps))
        state.num_train_epochs = math.ceil(self._course.epoch(num_steps))
        if done:
            self._recall()
        self._count(done)
        self.control = self._handler.on_train_begin(self._args, state, self.control)

    def _recall(self) -> None:
        """Fill the log with what the run logged before it was resumed; no callback hears it again."""
        file = self._course.metrics_file
        if not file.is_file():  # no tracker wrote it
            return
        self._state.log_history.clear()
        for line in file.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            step = row.pop("step")
            metrics = {name: math.nan if value is None else value for name, value in row.items()}
            own, evaluation = _parted(metrics)
            self._count(step)
            if own:
                self._collect(own)
                if self._is_due(step):
                    self._remember(self._collected())
            if evaluation:
                self._remember(self._named(evaluation, metrics.get("time/eval")))
        self._losses.clear()
        self._done = 0

    def _count(self, step: int) -> None:
        self._state.global_step, self._state.epoch = step * self._course.batch.updates, self._course.epoch(step)

    def _collect(self, own: Mapping[str, float]) -> None:
        # Every optimiser step's loss is in the sum; TRL logs their mean.
        loss = own.get("loss", 0.0) / self._course.batch.updates
        self._losses += [loss] if math.isfinite(loss) else []
        self._done += 1
        self._since.append({**own, "loss": loss})
        self._tokens += own.get("num_tokens", 0.0)

    def _collected(self) -> dict[str, float]:
        """The means since the last log, under TRL's names."""
        logs = {trl_name(name): value for name, value in _means(self._since).items()}
        logs |= _means([{name: value} for name, values in self._reported.items() for value in values])
        logs["num_tokens"] = self._tokens
        if "completions/mean_length" in logs:
            logs = {**dict.fromkeys(_TERMINATED, 0.0), **logs}
        # The bounds of what several processes measured, of which there is one.
        for name, known in (("low_min", "low_mean"), ("high_max", "high_mean")):
            if f"clip_ratio/{known}" in logs:
                logs[f"clip_ratio/{name}"] = logs[f"clip_ratio/{known}"]
        self._since, self._reported = [], {}
        return logs

    def _named(self, evaluation: Mapping[str, float], seconds: float | None) -> dict[str, float]:
        logs = {trl_name(name): value for name, value in evaluation.items()} | {"eval_num_tokens": self._tokens}
        if seconds:
            logs["eval_runtime"] = round(seconds, 4)
            logs["eval_samples_per_second"] = round(self._course.num_eval_rows / seconds, 3)
        return logs

    def _is_due(self, step: int) -> bool:
        """Whether a logging step lies inside this training step, which may be several of transformers' steps."""
        strategy, every, updates = self._args.logging_strategy, self._state.logging_steps, self._course.batch.updates
        if strategy == "epoch":
            return self._ends_epoch(step) or step == self._num_steps
        crossed = step * updates // every > (step - 1) * updates // every
        return strategy == "steps" and (crossed or (step == 1 and self._args.logging_first_step))

    def _ends_epoch(self, step: int) -> bool:
        return int(self._course.epoch(step)) > int(self._course.epoch(max(0, step - 1)))

    def _log(self, logs: dict[str, float]) -> None:
        self._hooks.log(logs)

    def tell(self, logs: dict[str, float]) -> None:
        """Into the log, and to the callbacks."""
        self._remember(logs)
        self.control = self._handler.on_log(self._args, self._state, self.control, logs=dict(logs))

    def _remember(self, logs: dict[str, float]) -> None:
        logs["epoch"] = round(float(self._state.epoch or 0.0), 4)
        self._state.log_history.append({**logs, "step": self._state.global_step})


def trl_name(name: str) -> str:
    """TRL's name of a metric."""
    return _NAMES.get(name, name.replace("eval/", "eval_", 1))


def _parted(metrics: Mapping[str, float]) -> tuple[dict[str, float], dict[str, float]]:
    """A step's own numbers, and those of an evaluation after it."""
    own = {name: value for name, value in metrics.items() if not name.startswith("eval/")}
    return own, {name: value for name, value in metrics.items() if name.startswith("eval/")}


def _means(rows: list[Mapping[str, float]]) -> dict[str, float]:
    """Of what is finite; of a rate, the last."""
    found: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.items():
            found.setdefault(name, [])
            if math.isfinite(value):
                found[name].append(value)
    return {
        name: math.nan if not values else values[-1] if name in _LAST else math.fsum(values) / len(values)
        for name, values in found.items()
    }
