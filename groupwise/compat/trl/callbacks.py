"""What a run tells transformers' callbacks, and TRL's `state.log_history`."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from typing import Any

from transformers.trainer_callback import CallbackHandler, TrainerControl, TrainerState
from transformers.trainer_utils import TrainOutput

from groupwise.compat.trl.arguments import Arguments
from groupwise.compat.trl.translate import Batch

logger = logging.getLogger(__name__)

_LAST = ("learning_rate",)
_NAMES = {
    "time/step": "step_time",
    "eval/mean_length": "eval_completions/mean_length",
    "eval/clipped_ratio": "eval_completions/clipped_ratio",
}
"""Metrics that TRL calls otherwise."""


class CallbackWatcher:
    """Follows a run for the callbacks of its trainer; one that asks for the end gets it.

    Args:
        num_rows: of the data, for epochs.
        handler: transformers' own, with its `DefaultFlowCallback`, which decides when numbers are logged.
    """

    def __init__(
        self, args: Arguments, handler: CallbackHandler, *, state: TrainerState, batch: Batch, num_rows: int
    ) -> None:
        self._args: Any = args  # callbacks ask for TrainingArguments, and read its attributes
        self._handler, self._state = handler, state
        self._batch, self._num_rows = batch, num_rows
        self.control = TrainerControl()
        self._since: list[Mapping[str, float]] = []
        self._losses: list[float] = []
        self._reported: dict[str, list[float]] = {}
        self._started = time.perf_counter()

    def initialised(self) -> None:
        """The trainer is complete."""
        self.control = self._handler.on_init_end(self._args, self._state, self.control)

    def report(self, name: str, value: float) -> None:
        """A number that a reward function logs by `log_metric`."""
        self._reported.setdefault(name, []).append(float(value))

    def begins(self, step: int, num_steps: int) -> None:
        state, batch = self._state, self._batch
        if not self._losses:
            state.max_steps = num_steps * batch.updates
            if self._args.logging_steps < 1:  # a part of all steps
                state.logging_steps = max(1, math.ceil(self._args.logging_steps * state.max_steps))
            state.num_train_epochs = math.ceil(self._epoch(num_steps))
            state.global_step, state.epoch = (step - 1) * batch.updates, self._epoch(step - 1)
            self.control = self._handler.on_train_begin(self._args, state, self.control)
        if self.control.should_save and self._args.save_strategy == "steps":
            logger.warning("a callback asked for a checkpoint, which only save_steps decides")
        if not self._losses or int(self._epoch(step - 1)) > int(self._epoch(max(0, step - 2))):
            self.control = self._handler.on_epoch_begin(self._args, state, self.control)
        self.control = self._handler.on_step_begin(self._args, state, self.control)

    def logged(self, step: int, metrics: Mapping[str, float]) -> bool:
        own = {name: value for name, value in metrics.items() if not name.startswith("eval/")}
        if own:
            self._after_step(step, own)
        if len(own) < len(metrics):
            self.evaluated({name: value for name, value in metrics.items() if name.startswith("eval/")})
        return bool(own) and self.control.should_training_stop

    def saved(self, step: int) -> None:
        self.control = self._handler.on_save(self._args, self._state, self.control)

    def evaluated(self, metrics: Mapping[str, float], *, prefix: str = "eval") -> dict[str, float]:
        """Log an evaluation's `eval/…` numbers under TRL's names; returns them."""
        logs = {trl_name(name).replace("eval", prefix, 1): value for name, value in metrics.items()}
        self._log(logs)
        self.control = self._handler.on_evaluate(self._args, self._state, self.control, metrics=logs)
        return logs

    def ended(self) -> TrainOutput:
        """The run's last log, and what `train` returns."""
        seconds, done = time.perf_counter() - self._started, len(self._losses)
        loss = math.fsum(self._losses) / done if done else math.nan
        logs = {
            "train_runtime": round(seconds, 4),
            "train_samples_per_second": round(done * self._batch.size / seconds, 3),
            "train_steps_per_second": round(done * self._batch.updates / seconds, 3),
            "train_loss": loss,
        }
        self._log(logs)
        self._handler.on_train_end(self._args, self._state, self.control)
        return TrainOutput(self._state.global_step, loss, logs)

    def _after_step(self, step: int, metrics: Mapping[str, float]) -> None:
        state, args = self._state, self._args
        # Every optimiser step's loss is in the sum; TRL logs their mean.
        loss = metrics.get("loss", math.nan) / self._batch.updates
        self._losses.append(loss)
        self._since.append({**metrics, "loss": loss})
        state.global_step, state.epoch = step * self._batch.updates, self._epoch(step)
        self.control = self._handler.on_step_end(args, state, self.control)
        if int(self._epoch(step)) > int(self._epoch(step - 1)):
            self.control = self._handler.on_epoch_end(args, state, self.control)
        if self.control.should_log or self._crossed(state.logging_steps):
            logs = {trl_name(name): value for name, value in _means(self._since).items()}
            logs |= {name: math.fsum(values) / len(values) for name, values in self._reported.items()}
            self._since, self._reported = [], {}
            self._log(logs)

    def _crossed(self, every: int) -> bool:
        """Whether a logging step lies inside this training step, which may be several of transformers' steps."""
        now, before = self._state.global_step, self._state.global_step - self._batch.updates
        return self._args.logging_strategy == "steps" and now // every > before // every

    def _log(self, logs: dict[str, float]) -> None:
        state = self._state
        logs["epoch"] = round(float(state.epoch or 0.0), 4)
        state.log_history.append({**logs, "step": state.global_step})
        self.control = self._handler.on_log(self._args, state, self.control, logs=logs)

    def _epoch(self, step: int) -> float:
        return step * self._batch.size / self._num_rows


def trl_name(name: str) -> str:
    """TRL's name of a metric."""
    return _NAMES.get(name, name.replace("eval/", "eval_", 1))


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
