"""GRPOTrainer: TRL's, on `groupwise.launch.run.run_training`."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers.trainer_utils import TrainOutput

from groupwise.assembly.session import Session
from groupwise.compat.trl.arguments import GRPOConfig
from groupwise.compat.trl.callbacks import CallbackWatcher
from groupwise.compat.trl.surface import GRPO_MEMBERS
from groupwise.compat.trl.trainer import Plan, Trainer, check_options, stream_rows
from groupwise.compat.trl.translate import Values, build_config, grpo_batch, grpo_values, in_trl_words
from groupwise.config.checks import check_trainable
from groupwise.data.files import SourceRow, read_for_training
from groupwise.errors import ConfigError
from groupwise.launch import Given, run_async, run_training
from groupwise.rewards import RewardScorer
from groupwise.rewards.signature import function_name
from groupwise.types import RolloutGroup

logger = logging.getLogger(__name__)

_EXTRAS = ("trainer_state", "log_metric", "log_extra")
_OPTIONS = ("processing_class", "tokenizer", "peft_config", "quantization_config", "callbacks")


class GRPOTrainer(Trainer):
    """TRL's GRPOTrainer.

    Args:
        model: a name, a folder, or a module of transformers or peft, which is trained in place.
        reward_funcs: one or a list of functions with TRL's signature, names of built-in rewards, `file.py:function`.
        train_dataset, eval_dataset: rows with `prompt`, a text or messages; rewards get the other columns.
        options: `processing_class` or `tokenizer`, `peft_config`, `quantization_config`, `callbacks`.

    Raises:
        ConfigError, DataError: before the model is loaded, wherever that is possible.

    Example:
        trainer = GRPOTrainer("Qwen/Qwen3-0.6B", [correct], GRPOConfig("outputs", max_steps=100), train_dataset=rows)
        trainer.train()
    """

    MEMBERS = GRPO_MEMBERS

    args: GRPOConfig
    train_dataset: Any
    eval_dataset: Any
    reward_funcs: Any
    _name = "GRPO"
    _tag_names = ("trl", "grpo", "groupwise")
    _eval_rows: list[SourceRow] | None
    _functions: list[tuple[Callable[..., Any], float]]

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: GRPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        **options: Any,
    ) -> None:
        check_options("GRPOTrainer", options, _OPTIONS)
        if train_dataset is None:
            raise ConfigError("GRPOTrainer: got no train_dataset; expected rows with a prompt each")
        self.args = GRPOConfig() if args is None else args
        self.train_dataset, self.eval_dataset, self.reward_funcs = train_dataset, eval_dataset, reward_funcs
        super().__init__(model, options=options, plan=self._planned(model))

    def train(
        self, resume_from_checkpoint: bool | str | Path | None = None, *, accept_changes: bool = False
    ) -> TrainOutput:
        """Train in place; the run directory is `run` in `output_dir`.

        An earlier run in `output_dir` is moved aside, unless `overwrite_output_dir` asks for its end.

        Args:
            resume_from_checkpoint: true goes on from the newest checkpoint of `output_dir`; its `checkpoint-N` from
                that one, and what the run did after it is forgotten.
            accept_changes: goes on where data, model or code are others than then, which is refused otherwise.

        Raises:
            KeyboardInterrupt: Ctrl-C; the step was done, and its checkpoint saved.
        """
        resume = self._start(resume_from_checkpoint)
        watcher = self._watch()
        with self._running(), self._held.at_work() as loaded:
            given = Given(
                loaded=loaded,
                train_data=self._plan.rows,
                eval_data=self._eval_rows,
                rewards=[function for function, _ in self._functions],
                reward_weights=[weight for _, weight in self._functions],
                reward_extras=self._extras(watcher),
                watcher=watcher,
            )
            summary = run_training(self.config, resume=resume, accept_changes=accept_changes, given=given)
        return watcher.ended(summary)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: None = None, *, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Sample and score each row `num_generations_eval` times; the numbers, which `log_history` gets too.

        Raises:
            ConfigError: there is nothing to evaluate.
        """
        self._refresh()
        rows = self._eval_rows if eval_dataset is None else _as_rows(eval_dataset)
        if rows is None:
            raise ConfigError("evaluate: got no eval_dataset; give one here or to the trainer")
        if ignore_keys:
            raise ConfigError(
                f"evaluate: ignore_keys = {ignore_keys!r}: evaluation samples, and has no outputs to drop"
            )
        started = time.perf_counter()
        config, watcher = self.config, self._watch()
        scorer = self._scorer(watcher)
        with self._held.at_work() as loaded:
            session = Session(config, loaded)
            prompts = session.prompts(rows, scorer, evaluated=True).prompts
            report = run_async(session.evaluate(prompts, scorer))
        metrics = {name: float(metric.value) for name, metric in report.metrics().items()}
        return watcher.evaluated(metrics, seconds=time.perf_counter() - started, prefix=metric_key_prefix)

    def generate_completions(self, dataset: Any) -> list[RolloutGroup]:
        """Sample each row `num_generations` times and score the answers, without learning from them.

        Args:
            dataset: rows, a data set, or a slice of one (`dataset[:4]`).

        Returns:
            A group for each row: its prompt, and rollouts with `text`, `rewards` by name and `reward`.
        """
        self._refresh()
        config, scorer = self.config, self._scorer(self._watch())
        with self._held.at_work() as loaded:
            session = Session(config, loaded)
            prompts = session.prompts(_as_rows(dataset), scorer, evaluated=False).prompts
            return run_async(session.groups(prompts, scorer))

    @property
    def _num_eval_rows(self) -> int:
        return len(self._eval_rows or ())

    @property
    def reward_func_names(self) -> list[str]:
        """As they are logged."""
        given = self.reward_funcs if isinstance(self.reward_funcs, list | tuple) else [self.reward_funcs]
        return [each if isinstance(each, str) else function_name(each) for each in given]

    def _planned(self, model: Any = None) -> Plan:
        eval_rows = None if self.eval_dataset is None else _eval_rows(self.eval_dataset)
        rewards = _rewards(self.reward_funcs, self.args.reward_weights)
        functions = [(function, weight) for function, weight in rewards if not isinstance(function, str)]
        self._set(_eval_rows=eval_rows, _functions=functions)
        batch = grpo_batch(self.args)
        rows = stream_rows(self.train_dataset, self.args, batch)
        values = grpo_values(self.args, batch, num_rows=len(rows))
        if named := [{"name": function, "weight": weight} for function, weight in rewards if isinstance(function, str)]:
            values["reward"] = named
        self._check(values, self._held.module if model is None else model)
        return Plan(batch, rows, values)

    def _check(self, values: Values, model: Any) -> None:
        """Refuse, in TRL's words, what can be refused before the model is loaded."""
        if values["eval.every"] and self._eval_rows is None:
            raise ConfigError("GRPOConfig.eval_strategy has nothing to evaluate; give eval_dataset, or leave it out")
        if type(self).evaluate is not GRPOTrainer.evaluate and (values["eval.every"] or self.args.eval_on_start):
            raise ConfigError(
                f"{type(self).__name__} overrides evaluate, and eval_strategy or eval_on_start asks for evaluations "
                "within the run, which do not call it; follow those by a TrainerCallback's on_evaluate"
            )
        path = {"model.path": str(model)} if isinstance(model, str | Path) else {}
        given = {"data.train": True, "data.eval": self.eval_dataset is not None, "reward": bool(self._functions)}
        provided = [name for name, there in {**given, "model.path": not path}.items() if there]
        try:
            config = build_config(self.args, {**values, **path})
            check_trainable(config, provided=provided)
            RewardScorer(
                config.reward,
                functions=[function for function, _ in self._functions],
                extras=dict.fromkeys(_EXTRAS),
            )
        except ConfigError as error:
            raise in_trl_words(self.args, error) from error

    def _scorer(self, watcher: CallbackWatcher) -> RewardScorer:
        return RewardScorer(
            self.config.reward,
            functions=[function for function, _ in self._functions],
            function_weights=[weight for _, weight in self._functions],
            extras=self._extras(watcher),
        )

    def _extras(self, watcher: CallbackWatcher) -> dict[str, Any]:
        """What TRL hands to functions that name it: the trainer's state, and ways to log."""
        return dict(zip(_EXTRAS, (self.state, watcher.report, _no_columns), strict=True))


def _rewards(given: Any, weights: Sequence[float] | None) -> list[tuple[Any, float]]:
    """Functions and names with their weights."""
    functions = [] if given is None else list(given) if isinstance(given, list | tuple) else [given]
    if not functions:
        raise ConfigError("GRPOTrainer: got no reward_funcs; expected functions, or names of built-in rewards")
    for function in functions:
        if not isinstance(function, str) and (isinstance(function, nn.Module | type) or not callable(function)):
            raise ConfigError(
                f"reward_funcs: got a {type(function).__name__}; expected functions, names of built-in rewards or "
                "file.py:function. A reward model is called in a function of yours"
            )
    if weights is not None and len(weights) != len(functions):
        raise ConfigError(f"GRPOConfig.reward_weights: got {len(weights)} for {len(functions)} reward functions")
    return list(zip(functions, weights or [1.0] * len(functions), strict=True))


def _eval_rows(data: Any) -> list[SourceRow]:
    return read_for_training(_as_rows(data), needed=None, setting="a number of rows, by take(n) or a slice")


def _as_rows(data: Any) -> Any:
    """Rows of what may also be a row of a data set, or a slice, which is a dict of columns."""
    if not isinstance(data, Mapping):
        return data
    if "prompt" not in data:
        raise ConfigError(f"got several data sets, {', '.join(map(str, data))}; give one of them")
    prompt = data["prompt"]
    if isinstance(prompt, str) or (prompt and isinstance(prompt[0], Mapping)):
        return [dict(data)]
    return [dict(zip(data, values, strict=True)) for values in zip(*data.values(), strict=True)]


def _no_columns(name: str, values: Any) -> None:
    """TRL's `log_extra`."""
    logger.warning(
        "log_extra(%r, …) changes nothing here: trajectories have no columns of rewards; use log_metric", name
    )
