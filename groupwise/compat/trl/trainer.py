"""What both trainers share: the model, the state, the callbacks, where things are saved and gone on from."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from transformers.trainer_callback import CallbackHandler, TrainerCallback, TrainerControl, TrainerState

from groupwise.compat.keeping import Place
from groupwise.compat.trl.arguments import Arguments
from groupwise.compat.trl.callbacks import CallbackWatcher, ConfigDecides, Course, Hooks
from groupwise.compat.trl.checkpoints import checkpoints_in, ready_to_resume, write_checkpoint
from groupwise.compat.trl.models import HeldModel, hold_model, loading_values
from groupwise.compat.trl.script_tail import RESULTS, STATE, ScriptTail, state_dict
from groupwise.compat.trl.translate import Batch, Values, build_config
from groupwise.config import Config
from groupwise.data.files import SourceRow, read_for_training
from groupwise.errors import ConfigError, Interrupted
from groupwise.files import write_json_atomic, write_text_atomic
from groupwise.model.forward.recompute import recomputes_layers
from groupwise.model.quantized import is_packed
from groupwise.place import Place as RunPlace

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

_WHEN_LOADED = ("model_init_kwargs", "trust_remote_code", "bf16", "fp16", "use_cpu", "no_cuda", "chat_template_path")
"""Arguments that the model was loaded by."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What the arguments and data sets of a trainer amount to, at the moment.

    Attributes:
        values: the settings, without those of the model.
    """

    batch: Batch
    rows: list[SourceRow]
    values: Values


class Trainer(ScriptTail):
    """A model to train in place, and the config that its arguments became.

    Attributes:
        model: the program's; a `peft.PeftModel` where there is a `peft_config`.
        state: transformers' TrainerState; `state.log_history` has TRL's keys.
        is_in_train: whether a run is going on.
    """

    ASSIGNABLE: ClassVar[frozenset[str]] = frozenset({"args", "train_dataset", "eval_dataset", "reward_funcs"})

    config: Config
    is_in_train: bool
    _complete: bool
    _held: HeldModel
    _plan: Plan
    _stale: bool
    _watcher: CallbackWatcher
    _places: dict[Path, Place]

    def __init__(self, model: Any, *, options: Mapping[str, Any], plan: Plan) -> None:
        self._plan, self._stale, self.is_in_train = plan, False, False
        tokenizer = options.get("processing_class") or options.get("tokenizer")
        self._held = _hold(model, self.args, tokenizer=tokenizer, options=options)
        self.config = self._configured(plan)
        self.processing_class = self.tokenizer = self._held.tokenizer
        self.state = TrainerState()
        self._output_place, self._places = self._new_place(), {}
        callbacks = [ConfigDecides, *_checked_callbacks(options.get("callbacks"))]
        self.callback_handler = CallbackHandler(callbacks, self._held.model, self._held.tokenizer, None, None)
        self._watcher = self._watch()
        self._watcher.initialised()
        self.args.used_by(self)
        self._complete = True

    @property
    def model(self) -> Any:
        return self._held.model

    @property
    def model_wrapped(self) -> Any:
        """The model, which nothing wraps."""
        return self._held.model

    @property
    def control(self) -> TrainerControl:
        return self._watcher.control

    @property
    def hub_model_id(self) -> str | None:
        return self.args.hub_model_id

    def get_total_train_batch_size(self, args: Arguments | None = None) -> int:
        """Completions, or rows, in an optimiser step."""
        return self._plan.batch.size // self._plan.batch.steps * self._plan.values.get("rollout.group_size", 1)

    def num_examples(self, dataloader: Any = None) -> int:
        """Rows of the training data."""
        return len(self._plan.rows)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Into `state.log_history` and to the callbacks; a run calls it for each of its logs."""
        self._watcher.tell(logs)

    def add_callback(self, callback: Any) -> None:
        """A `transformers.TrainerCallback`, or its class."""
        self.callback_handler.add_callback(*_checked_callbacks([callback]))

    def pop_callback(self, callback: Any) -> Any:
        """Take it out, given itself or its class; returns it."""
        return self.callback_handler.pop_callback(callback)

    def remove_callback(self, callback: Any) -> None:
        self.callback_handler.remove_callback(callback)

    def save_model(self, output_dir: str | Path | None = None, _internal_call: bool = False) -> None:
        """Write the model, or its adapter alone, and the tokenizer into `output_dir`, or into the config's.

        A run calls it for each `checkpoint-N`. A model that another program left there is moved aside.
        """
        folder = Path(output_dir or self.args.output_dir)
        own = folder.resolve() == self._output_place.folder.resolve()
        place = self._output_place if own else self._places.setdefault(folder.resolve(), Place(folder))

        def write(new: Path) -> None:
            self._held.save(new, home=folder)
            self._held.tokenizer.save_pretrained(new)

        place.save(write)

    def args_change(self, name: str) -> None:
        """Raises ConfigError where an argument changes that has had its effect; others act at the next `train`."""
        place = f"{type(self.args).__name__}.{name}"
        if self.is_in_train:
            raise ConfigError(f"{place} cannot change while a run is going on; end it, and call train() again")
        if name in _WHEN_LOADED:
            raise ConfigError(f"{place} cannot change: the trainer's model was loaded by it; make a new config for it")
        self._set(_stale=True)

    def _assigned(self, name: str, value: Any) -> None:
        if self.is_in_train:
            raise ConfigError(f"{type(self).__name__}.{name} cannot be set while a run is going on")
        before = vars(self)[name]
        if name == "args":
            if not isinstance(value, Arguments) or value.SETTINGS is not before.SETTINGS:
                raise ConfigError(f"{type(self).__name__}.args: got a {type(value).__name__}; expected such a config")
            for argument in _WHEN_LOADED:
                if vars(value).get(argument) != vars(before).get(argument):
                    raise ConfigError(f"{type(self).__name__}.args: {argument} differs, and the model was loaded by it")
        vars(self)[name] = value
        try:
            self._refresh(always=True)
        except BaseException:
            vars(self)[name] = before
            raise
        if name == "args":
            before.no_longer_used_by(self)
            value.used_by(self)

    def _planned(self) -> Plan:
        """The plan of the arguments and data sets as they are now; refuses what it can without the model."""
        raise NotImplementedError

    def _refresh(self, *, always: bool = False) -> None:
        """Take what the program changed since the trainer was made. A list of rows may have changed in itself."""
        if not (always or self._stale or isinstance(self.train_dataset, list)):
            return
        plan = self._planned()
        self._set(config=self._configured(plan), _plan=plan, _stale=False)
        place = self._output_place
        if (place.folder, place.replace) != (Path(self.args.output_dir), self.args.overwrite_output_dir):
            self._set(_output_place=self._new_place())

    def _configured(self, plan: Plan) -> Config:
        dropout = {"lora.dropout": 0.0} if self._held.lora and self.args.to_dict().get("disable_dropout") else {}
        model = _model_values(self._held, stop=plan.values.get("rollout.stop", ()))
        return build_config(self.args, plan.values | model | dropout)

    def _new_place(self) -> Place:
        return Place(self.args.output_dir, replace=self.args.overwrite_output_dir)

    @property
    def _num_eval_rows(self) -> int:
        return 0

    def _watch(self) -> CallbackWatcher:
        """Followed by the callbacks, which hear the present state."""
        course = Course(
            self._plan.batch,
            num_rows=max(1, len(self._plan.rows)),
            num_eval_rows=self._num_eval_rows,
            metrics_file=Path(self.config.train.output) / "metrics.jsonl",
        )
        hooks = Hooks(log=lambda logs: self.log(logs), save=self._save_checkpoint_folder)
        watcher = CallbackWatcher(self.args, self.callback_handler, state=self.state, course=course, hooks=hooks)
        self._set(_watcher=watcher)
        return watcher

    def _save_checkpoint_folder(self, step: int) -> None:
        """`checkpoint-N`, N counting TRL's steps."""

        def fill(folder: Path) -> None:
            self.save_model(str(folder), _internal_call=True)
            write_json_atomic(folder / STATE, state_dict(self.state))
            write_text_atomic(folder / "training_args.json", self.args.to_json_string() + "\n")

        train = self.config.train
        write_checkpoint(
            Path(self.args.output_dir),
            step * self._plan.batch.updates,
            run=Path(train.output),
            step=step,
            keep=train.keep_checkpoints,
            fill=fill,
        )

    def _start(self, resume_from_checkpoint: Any) -> bool:
        """Begin a new state; whether the run is to be resumed, from what is now its newest checkpoint."""
        self._refresh()
        config, updates, output = self.config, self._plan.batch.updates, Path(self.args.output_dir)
        state = TrainerState(
            logging_steps=max(1, int(self.args.logging_steps)),
            save_steps=config.train.save_every * updates,
            eval_steps=max(1, config.eval.every * updates),
            train_batch_size=self._plan.batch.size,
        )
        self._set(state=state)
        run = Path(config.train.output)
        RunPlace.of(run).check_free()  # before anything of it is moved
        given = self.args.resume_from_checkpoint if resume_from_checkpoint is None else resume_from_checkpoint
        if given is not None and given is not False:
            ready_to_resume(given, output=output, run=run)
            return True
        earlier = [path.name for path in checkpoints_in(output)]
        if RunPlace.of(run).names:
            earlier.append(run.name)
        if earlier:
            self._output_place.forget()
            self._output_place.free([*earlier, STATE, *RESULTS])
        return False

    @contextmanager
    def _running(self) -> Iterator[None]:
        """While a run goes on. Ctrl-C ends as in transformers, when the step is done and saved: KeyboardInterrupt."""
        self._set(is_in_train=True)
        try:
            yield
        except Interrupted as stopped:
            raise KeyboardInterrupt(
                f"{stopped}; trainer.model is the trained model, and train(resume_from_checkpoint=True) goes on"
            ) from stopped
        finally:
            self._set(is_in_train=False)


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
