"""From TRL's arguments to the one config. Each function gives dotted settings; later ones win."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from groupwise.compat.trl.algorithm import algorithm_values
from groupwise.compat.trl.arguments import Arguments, GRPOConfig, SFTConfig
from groupwise.compat.trl.sampling import sampling_values
from groupwise.config import Config
from groupwise.config.keys import annotation_of, nearest_key
from groupwise.config.problems import problems_of
from groupwise.config.renamed import dotted_of_today
from groupwise.config.values import literal, tree_of
from groupwise.errors import ConfigError
from groupwise.tracking.registry import BUILDERS

logger = logging.getLogger(__name__)

Values = dict[str, Any]

ALL = 1_000_000_000
"""Where TRL has no limit and Groupwise asks for one."""

RUN_FOLDER = "run"
"""The run directory, below TRL's output_dir, which is free for what save_model writes."""


@dataclass(frozen=True, slots=True)
class Batch:
    """What a step is made of, in prompts or rows and in TRL's optimiser steps.

    Attributes:
        size: prompts (SFT: rows) in a training step of Groupwise's.
        steps, passes: optimiser steps made of it, and times that it is learned.

    Example:
        Batch(size=4, steps=2, passes=1)
    """

    size: int
    steps: int = 1
    passes: int = 1

    @property
    def updates(self) -> int:
        return self.steps * self.passes

    def steps_for(self, updates: float) -> int:
        """Training steps with at least so many optimiser steps."""
        return max(1, math.ceil(updates / self.updates))


def grpo_batch(args: GRPOConfig) -> Batch:
    """Whole groups; says so where TRL's sizes, which count completions, are none.

    Raises:
        ConfigError: the sizes contradict each other.
    """
    per_pass, accumulated, group = (
        _count(args, name) for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "num_generations")
    )
    batches = args.steps_per_generation or accumulated
    if args.generation_batch_size is not None:
        if args.steps_per_generation is not None:
            raise ConfigError("GRPOConfig: got generation_batch_size and steps_per_generation; give one of them")
        batches = _whole(args, "generation_batch_size", per_pass)
    if batches % accumulated and accumulated % batches:
        raise ConfigError(
            f"GRPOConfig: {batches} batches sampled together and gradient_accumulation_steps = {accumulated} do not "
            "divide each other; make the optimiser steps of one sampling a whole number"
        )
    completions, steps = per_pass * max(batches, accumulated), max(1, batches // accumulated)
    prompts = max(steps, -(-completions // group))
    if prompts * group != completions:
        logger.warning(
            "effective batch: %d completions (per_device_train_batch_size = %d x %d) become %d prompts of "
            "num_generations = %d, so %d completions: every group stays whole",
            *(completions, per_pass, completions // per_pass, prompts, group, prompts * group),
        )
    return Batch(prompts, steps, args.num_iterations)


def sft_batch(args: SFTConfig) -> Batch:
    return Batch(_count(args, "per_device_train_batch_size") * _count(args, "gradient_accumulation_steps"))


def grpo_values(args: GRPOConfig, batch: Batch, *, num_rows: int) -> Values:
    """Everything but model, data and rewards."""
    return {
        **_shared(args, batch, num_rows=num_rows),
        **_evaluation(args, batch, num_rows=num_rows),
        **algorithm_values(args),
        **_samples(args, batch),
        **sampling_values(args),
        "data.max_prompt_tokens": ALL if args.max_prompt_length is None else args.max_prompt_length,
        "rollout.prompts_per_step": batch.size,
        "optim.steps_per_batch": batch.steps,
    }


def sft_values(args: SFTConfig, batch: Batch, *, num_rows: int) -> Values:
    """Everything but model and data."""
    if args.eval_on_start or args.eval_strategy != "no" or args.evaluation_strategy not in (None, "no"):
        raise ConfigError(
            "SFTConfig.eval_strategy: supervised training evaluates nothing; measure answers by GRPOTrainer.evaluate"
        )
    longest = args.max_length if args.max_seq_length is None else args.max_seq_length
    return {
        **_shared(args, batch, num_rows=num_rows),
        "sft.rows_per_step": batch.size,
        "sft.max_tokens": ALL if longest is None else longest,
        "data.max_prompt_tokens": ALL if longest is None else longest,
        "data.shuffle": args.shuffle_dataset is not False,
    }


def build_config(args: Arguments, values: Values) -> Config:
    """The config of these settings, with `args.groupwise` laid over them.

    Raises:
        ConfigError: in TRL's names, everything that is wrong.
    """
    over: Mapping[str, Any] = args.groupwise or {}
    where = f"{type(args).__name__}.groupwise"
    for name in over:
        if annotation_of(name) is None:
            raise ConfigError(f"{where}: there is no setting {name!r}; {nearest_key(name)}")
    tree = tree_of({**values, **dotted_of_today(over, where)})
    try:
        config, error = Config.model_validate(tree), None
    except ValidationError as found:
        config, error = None, found
    problems = [str(problem) for problem in problems_of(error, tree, lambda dotted: origin(args, dotted))]
    if problems or config is None:
        raise ConfigError("\n".join(problems))
    return config


def origin(args: Arguments, dotted: str) -> str:
    """The arguments that decide a setting, in TRL's names."""
    names = [name for name, setting in args.SETTINGS.items() if dotted in setting.becomes and name in args.given]
    return f"{type(args).__name__}.{'/'.join(names)}" if names else f"{type(args).__name__}"


def in_trl_words(args: Arguments, error: ConfigError) -> ConfigError:
    """The error, with a legend: which of TRL's arguments its settings are."""
    text = str(error)
    known = {
        setting.becomes: name
        for name, setting in args.SETTINGS.items()
        if setting.kind == "same" and setting.becomes in text
    }
    legend = "; ".join(f"{setting} is {type(args).__name__}.{name}" for setting, name in known.items())
    return ConfigError(f"{text}\n({legend})") if legend else error


def _shared(args: Arguments, batch: Batch, *, num_rows: int) -> Values:
    same = {
        setting.becomes.partition(";")[0]: vars(args)[name]
        for name, setting in args.SETTINGS.items()
        if setting.kind == "same" and vars(args)[name] is not None
    }
    if args.data_seed not in (None, args.seed):
        raise ConfigError(
            f"{type(args).__name__}: data_seed = {args.data_seed} and seed = {args.seed}; one seed decides both: give "
            "one, or the same"
        )
    keep = args.save_total_limit
    return {
        **same,
        **_length(args, batch),
        **_optimiser(args),
        **_trackers(args),
        "optim.betas": (args.adam_beta1, args.adam_beta2),
        "model.dtype": "bfloat16" if args.bf16 or args.fp16 else "float32" if args.bf16 is False else "auto",
        "model.device": "cpu" if args.use_cpu or args.no_cuda else "auto",
        "tracking.run_name": args.run_name or Path(args.output_dir).resolve().name,
        "train.output": str(Path(args.output_dir) / RUN_FOLDER),
        "train.save_every": _every(args, "save", args.save_steps, batch=batch, num_rows=num_rows),
        "train.save_every_minutes": 0.0,  # saves are where save_strategy and save_steps put them
        "train.keep_checkpoints": ALL if keep is None or keep <= 0 else keep,
    }


def _length(args: Arguments, batch: Batch) -> Values:
    place = type(args).__name__
    if args.max_steps == 0 or args.max_steps < -1 or args.max_steps % 1:
        raise ConfigError(f"{place}.max_steps = {args.max_steps}: expected a whole number above 0, or None")
    every = args.logging_steps
    if args.logging_strategy not in ("no", "steps", "epoch") or every <= 0 or (every > 1 and every % 1):
        raise ConfigError(
            f"{place}: logging_strategy = {args.logging_strategy!r}, logging_steps = {every}; expected no, epoch, or "
            "steps with a whole number above 0, or a part of all steps"
        )
    return {"train.steps": None if args.max_steps == -1 else batch.steps_for(args.max_steps)}


def _optimiser(args: Arguments) -> Values:
    place = type(args).__name__
    name = _OPTIMISERS.get(args.optim)
    if name is None:
        raise ConfigError(f"{place}.optim = {args.optim!r} is not there; expected one of {', '.join(_OPTIMISERS)}")
    if name == "adamw_8bit" and find_spec("bitsandbytes") is None:
        logger.warning("%s.optim = %r: bitsandbytes is not installed, so its moments have 32 bits", place, args.optim)
        name = "adamw"
    kind, options = args.lr_scheduler_type, dict(args.lr_scheduler_kwargs or {})
    schedule = _SCHEDULES.get(kind)
    if schedule is None:
        raise ConfigError(f"{place}.lr_scheduler_type = {kind!r} is not there; expected one of {', '.join(_SCHEDULES)}")
    ratio = options.pop("min_lr_rate", 0.0)
    if "min_lr" in options:
        ratio = options.pop("min_lr") / args.learning_rate
    if options or (ratio and schedule == "constant"):
        raise ConfigError(f"{place}.lr_scheduler_kwargs = {args.lr_scheduler_kwargs!r}: expected min_lr_rate or min_lr")
    warmup = {"optim.warmup_ratio": args.warmup_ratio}
    if args.warmup_steps:  # wins over the ratio, as it does in transformers
        fraction = args.warmup_steps < 1
        warmup = {"optim.warmup_ratio" if fraction else "optim.warmup_steps": args.warmup_steps}
    return {"optim.name": name, "optim.schedule": schedule, "optim.min_lr_ratio": ratio, **warmup}


_OPTIMISERS = {
    "adamw_torch_fused": "adamw",
    "adamw_torch": "adamw",
    "adamw_hf": "adamw",
    "paged_adamw_32bit": "adamw",
    "adamw_8bit": "adamw_8bit",
    "adamw_bnb_8bit": "adamw_8bit",
    "adamw_torch_8bit": "adamw_8bit",
    "paged_adamw_8bit": "adamw_8bit",
    "muon": "muon",
}

_SCHEDULES = {
    "linear": "linear",
    "cosine": "cosine",
    "cosine_with_min_lr": "cosine",
    "constant": "constant",
    "constant_with_warmup": "constant",
}


_OWN_TRACKERS = ("console", "jsonl", "tensorboard")


def _trackers(args: Arguments) -> Values:
    asked = [args.report_to] if isinstance(args.report_to, str) else list(args.report_to)
    backends = ["jsonl"] if args.disable_tqdm else ["console", "jsonl"]
    if "all" in asked:  # as in transformers: all that are installed
        asked = ["tensorboard", *(name for name in BUILDERS if name not in _OWN_TRACKERS and find_spec(name))]
    for name in asked:
        there = name in _OWN_TRACKERS or (name in BUILDERS and find_spec(name) is not None)
        if name != "none" and not there:
            why = "is not installed" if name in BUILDERS else f"is no tracker; there are {', '.join(BUILDERS)}"
            logger.warning(
                "%s.report_to: %s %s; its numbers go to TensorBoard files and to metrics.jsonl",
                *(type(args).__name__, name, why),
            )
        if name != "none":
            backends.append(name if there else "tensorboard")
    return {"tracking.backends": tuple(dict.fromkeys(backends))}


def _samples(args: GRPOConfig, batch: Batch) -> Values:
    if not args.log_completions:
        if args.num_completions_to_print is not None:
            raise ConfigError("GRPOConfig.num_completions_to_print has no effect without log_completions = True")
        return {}
    shown = {} if args.num_completions_to_print is None else {"tracking.samples": args.num_completions_to_print}
    return {"tracking.samples_every": batch.steps_for(max(1, args.logging_steps)), **shown}


def _evaluation(args: GRPOConfig, batch: Batch, *, num_rows: int) -> Values:
    """As TRL does, evaluation samples at training's temperature."""
    steps = args.logging_steps if args.eval_steps is None else args.eval_steps
    return {
        "eval.every": _every(args, "eval", steps, batch=batch, num_rows=num_rows),
        "eval.samples": args.num_generations_eval or args.num_generations,
    }


def _every(args: Arguments, what: str, steps: float, *, batch: Batch, num_rows: int) -> int:
    """Training steps between two savings or evaluations, 0 for never."""
    strategy = vars(args)[f"{what}_strategy"]
    if what == "eval" and args.evaluation_strategy is not None:
        strategy = args.evaluation_strategy
    per_epoch = max(1, math.ceil(num_rows / batch.size))
    if strategy == "no":
        return 0
    if strategy == "epoch":
        return per_epoch
    if strategy != "steps" or steps <= 0:
        raise ConfigError(
            f"{type(args).__name__}: {what}_strategy = {strategy!r}, {what}_steps = {literal(steps)}; expected no, "
            "epoch, or steps with a number above 0"
        )
    if steps >= 1:
        return batch.steps_for(steps)
    total = math.ceil(args.num_train_epochs * num_rows / batch.size)
    return max(1, math.ceil(steps * (total if args.max_steps == -1 else batch.steps_for(args.max_steps))))


def _count(args: Arguments, name: str) -> int:
    value = vars(args)[name]
    if not isinstance(value, int) or value < 1:
        raise ConfigError(f"{type(args).__name__}.{name} = {value!r}: expected a whole number above 0")
    return value


def _whole(args: GRPOConfig, name: str, part: int) -> int:
    value = _count(args, name)
    if value % part:
        raise ConfigError(f"GRPOConfig.{name} = {value} is no multiple of per_device_train_batch_size = {part}")
    return value // part
