"""What both trainers share: the model, the state, the callbacks."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers.trainer_callback import CallbackHandler, TrainerCallback, TrainerState

from groupwise.checkpoint import find_latest
from groupwise.compat.trl.arguments import Arguments
from groupwise.compat.trl.callbacks import CallbackWatcher, ConfigDecides, Course
from groupwise.compat.trl.models import HeldModel, hold_model, loading_values
from groupwise.compat.trl.translate import Batch, Values, build_config
from groupwise.config import Config
from groupwise.data.files import SourceRow, read_for_training
from groupwise.errors import ConfigError
from groupwise.model.quantized import is_packed
from groupwise.model.recompute import recomputes_layers

logger = logging.getLogger(__name__)

_REFUSED = {
    "reward_processing_classes": "reward models are called in a function of yours, with its own tokenizer",
    "optimizers": "name one by optim",
    "optimizer_cls_and_kwargs": "name one by optim",
    "tools": "there are no tools",
    "rollout_func": "samples come from rollout.engine",
    "environment_factory": "there are no environments",
    "data_collator": "rows are packed, and never padded",
    "compute_loss_func": "the loss is loss_type, or the mean over the learned tokens",
    "compute_metrics": "rewards are the metrics",
    "preprocess_logits_for_metrics": "logits are never kept",
}
"""Arguments of TRL's trainers that have to be None, and why."""


class Trainer:
    """A model to train in place, and the config that its arguments became.

    Args:
        tokenizers: what the program gave for it under one name or another; the first that is not None.
        values: the settings, without those of the model.
        rewards: entries of `reward`.

    Attributes:
        model: the program's; a `peft.PeftModel` where there is a `peft_config`.
        state: transformers' TrainerState; `state.log_history` has TRL's keys.
    """

    def __init__(
        self,
        model: Any,
        args: Arguments,
        *,
        options: Mapping[str, Any],
        batch: Batch,
        rows: list[SourceRow],
        values: Values,
    ) -> None:
        self._batch, self._rows = batch, rows
        tokenizer = options.get("processing_class") or options.get("tokenizer")
        self._held = _hold(model, args, tokenizer=tokenizer, options=options)
        self.config: Config = build_config(
            args, values | _model_values(self._held, stop=values.get("rollout.stop", ()))
        )
        self.processing_class = self.tokenizer = self._held.tokenizer
        self.state = TrainerState()
        callbacks = [ConfigDecides, *_checked_callbacks(options.get("callbacks"))]
        self.callback_handler = CallbackHandler(callbacks, self._held.model, self._held.tokenizer, None, None)
        self._watch(args).initialised()

    @property
    def model(self) -> Any:
        return self._held.model

    def add_callback(self, callback: Any) -> None:
        """A `transformers.TrainerCallback`, or its class."""
        self.callback_handler.add_callback(*_checked_callbacks([callback]))

    def pop_callback(self, callback: Any) -> Any:
        """Take it out, given itself or its class; returns it."""
        return self.callback_handler.pop_callback(callback)

    def remove_callback(self, callback: Any) -> None:
        self.callback_handler.remove_callback(callback)

    def save_model(self, output_dir: str | Path | None = None) -> None:
        """Write the model, or its adapter alone, and the tokenizer into `output_dir`, or into the config's."""
        folder = Path(output_dir or Path(self.config.train.output).parent)
        self._held.save(folder)
        self._held.tokenizer.save_pretrained(folder)

    @property
    def _num_eval_rows(self) -> int:
        return 0

    def _watch(self, args: Arguments) -> CallbackWatcher:
        course = Course(
            self._batch,
            num_rows=max(1, len(self._rows)),
            num_eval_rows=self._num_eval_rows,
            metrics_file=Path(self.config.train.output) / "metrics.jsonl",
        )
        return CallbackWatcher(args, self.callback_handler, state=self.state, course=course)

    def _start(self, args: Arguments, resume_from_checkpoint: Any) -> bool:
        """Begin a new state; whether the run is to be resumed."""
        config, updates = self.config, self._batch.updates
        self.state = TrainerState(
            logging_steps=max(1, int(args.logging_steps)),
            save_steps=config.train.save_every * updates,
            eval_steps=max(1, config.eval.every * updates),
            train_batch_size=self._batch.size,
        )
        run = Path(config.train.output)
        if resume_from_checkpoint is None or resume_from_checkpoint is False:
            if run.is_dir() and any(run.iterdir()):
                logger.warning("%s: the earlier run there is replaced", run)
            return False
        newest = find_latest(run / "checkpoints")
        if newest is None:
            raise ConfigError(
                f"resume_from_checkpoint = {resume_from_checkpoint!r}: there is no checkpoint in {str(run)!r}; "
                "leave it out to start"
            )
        if resume_from_checkpoint is not True:
            known = {place.resolve() for place in (newest, newest.parent, run, run.parent)}
            given = resume_from_checkpoint
            if not isinstance(given, str | Path) or Path(given).resolve() not in known:
                raise ConfigError(
                    f"resume_from_checkpoint = {given!r}: expected True or {str(newest)!r}, the newest checkpoint "
                    f"in {str(run)!r}"
                )
        return True


def _checked_callbacks(callbacks: Any) -> list[Any]:
    """Raises ConfigError where it is no list of transformers' callbacks or their classes."""
    if not isinstance(callbacks, list | tuple | None):
        raise ConfigError(f"callbacks: got a {type(callbacks).__name__}; expected a list of TrainerCallbacks")
    for callback in callbacks or ():
        kind = callback if isinstance(callback, type) else type(callback)
        if not issubclass(kind, TrainerCallback):
            raise ConfigError(f"callbacks: got a {kind.__name__}; expected transformers.TrainerCallback, or its class")
    return list(callbacks or ())


def stream_rows(data: Any, args: Arguments, batch: Batch) -> list[SourceRow]:
    """The rows of a data set; of one without a length, as many as `max_steps` asks for.

    Raises:
        DataError: it has no length, and there is no `max_steps`.
    """
    updates = args.max_steps
    needed = batch.steps_for(updates) * batch.size if updates > 0 else None
    return read_for_training(data, needed=needed, setting="max_steps")


def check_options(name: str, options: Mapping[str, Any], known: Sequence[str]) -> None:
    """Refuse arguments of a trainer that are not its own.

    Raises:
        ConfigError: says why, or that TRL has no such argument either.
    """
    for option, value in options.items():
        if option in known or value is None or (isinstance(value, tuple) and not any(value)):
            continue
        why = _REFUSED.get(option)
        raise ConfigError(
            f"{name} has no argument {option!r}" if why is None else f"{name}: {option} is refused: {why}"
        )


def _hold(model: Any, args: Arguments, *, tokenizer: Any, options: Mapping[str, Any]) -> HeldModel:
    config: Values = {
        "dtype": "bfloat16" if args.bf16 or args.fp16 else "auto",
        "device": "cpu" if args.use_cpu or args.no_cuda else "auto",
        "trust_remote_code": args.trust_remote_code,
        "chat_template": args.to_dict().get("chat_template_path"),
    }
    asked = {**(args.model_init_kwargs or {}), "quantization_config": options.get("quantization_config")}
    config |= {key: value for key, value in loading_values(asked).items() if value not in ("auto", False)}
    return hold_model(model, args, tokenizer=tokenizer, peft_config=options.get("peft_config"), config=config)


def _model_values(held: HeldModel, *, stop: Sequence[str]) -> Values:
    """Settings that the model itself decides."""
    end = held.tokenizer.eos_token_id
    own = "" if end is None else held.tokenizer.decode([end], skip_special_tokens=False)
    return {
        "model.path": held.name,
        "model.device": str(held.module.device),
        "model.quantization": "nf4" if is_packed(held.module) else "none",
        # The model's own end token ends a completion anyway, and is no part of its text.
        "rollout.stop": tuple(text for text in stop if text != own),
        **({"model.gradient_checkpointing": True} if recomputes_layers(held.module) else {}),
        **held.lora,
    }
