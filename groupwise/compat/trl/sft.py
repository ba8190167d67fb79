"""SFTTrainer: TRL's, on `groupwise.launch.run_sft`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers.trainer_utils import TrainOutput

from groupwise.compat.trl.arguments import SFTConfig
from groupwise.compat.trl.surface import SFT_MEMBERS
from groupwise.compat.trl.trainer import Plan, Trainer, check_options, stream_rows
from groupwise.compat.trl.translate import Values, build_config, in_trl_words, sft_batch, sft_values
from groupwise.config import Config
from groupwise.config.checks import check_supervised
from groupwise.data.chat import render
from groupwise.data.files import SourceRow
from groupwise.errors import ConfigError
from groupwise.launch import run_sft
from groupwise.protocols import Tokenizer

_OPTIONS = ("processing_class", "tokenizer", "peft_config", "quantization_config", "callbacks", "formatting_func")
_TEXT = "text"
_NO_EVALUATION = (
    "SFTTrainer: eval_dataset is refused: supervised training evaluates nothing; measure answers by "
    "GRPOTrainer.evaluate, or `groupwise eval`"
)


class SFTTrainer(Trainer):
    """TRL's SFTTrainer.

    Rows have a text, all of which is learned; or `messages`, all learned as the chat template writes them, with
    `assistant_only_loss` the assistant's turns alone; or `prompt` and `completion`, which alone is learned.

    Args:
        model: a name, a folder, or a module of transformers or peft, which is trained in place.
        options: `processing_class` or `tokenizer`, `peft_config`, `quantization_config`, `callbacks`,
            `formatting_func` from a row to its text.

    Raises:
        ConfigError, DataError: before the model is loaded, wherever that is possible.

    Example:
        SFTTrainer("Qwen/Qwen3-0.6B", SFTConfig("outputs", max_length=512), train_dataset=rows).train()
    """

    MEMBERS = SFT_MEMBERS
    ASSIGNABLE = Trainer.ASSIGNABLE - {"reward_funcs"}

    args: SFTConfig
    train_dataset: Any
    eval_dataset: Any
    _name = "SFT"
    _tag_names = ("trl", "sft", "groupwise")
    _texts: list[SourceRow]
    _formatting: Callable[[Any], str] | None

    def __init__(
        self,
        model: Any,
        args: SFTConfig | None = None,
        *,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        **options: Any,
    ) -> None:
        check_options("SFTTrainer", options, _OPTIONS)
        if train_dataset is None:
            raise ConfigError("SFTTrainer: got no train_dataset; expected rows with a text, messages or a completion")
        if eval_dataset is not None:
            raise ConfigError(_NO_EVALUATION)
        self.args = SFTConfig() if args is None else args
        self.train_dataset, self.eval_dataset = train_dataset, None
        self._formatting = options.get("formatting_func")
        super().__init__(model, options=options, plan=self._planned(model))

    def train(
        self, resume_from_checkpoint: bool | str | Path | None = None, *, accept_changes: bool = False
    ) -> TrainOutput:
        """Train in place; as `GRPOTrainer.train`."""
        resume = self._start(resume_from_checkpoint)
        watcher = self._watch()
        with self._running(), self._held.at_work() as loaded:
            summary = run_sft(
                self.config,
                resume=resume,
                accept_changes=accept_changes,
                loaded=loaded,
                train_data=self._texts,
                watcher=watcher,
            )
        return watcher.ended(summary)

    def evaluate(self, *given: Any, **options: Any) -> dict[str, float]:
        """Refused: supervised training evaluates nothing.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(_NO_EVALUATION)

    def _configured(self, plan: Plan) -> Config:
        column = plan.values["sft.text_column"]
        as_chat = column is not None and column not in plan.rows[0].values
        rows = [_rendered(row, self._held.tokenizer) for row in plan.rows] if as_chat else plan.rows
        self._set(_texts=rows)
        return super()._configured(plan)

    def _planned(self, model: Any = None) -> Plan:
        if self.eval_dataset is not None:
            raise ConfigError(_NO_EVALUATION)
        batch = sft_batch(self.args)
        rows = _formatted(stream_rows(self.train_dataset, self.args, batch), self._formatting)
        column = self._text_column(rows[0].values, formatted=self._formatting is not None)
        values = {**sft_values(self.args, batch, num_rows=len(rows)), "sft.text_column": column}
        self._check(values, self._held.module if model is None else model)
        return Plan(batch, rows, values)

    def _text_column(self, first: Mapping[str, Any], *, formatted: bool) -> str | None:
        """The column with whole texts; None where answers are learned."""
        field = self.args.dataset_text_field
        if formatted:
            return _TEXT
        if field in first:
            return field
        if "dataset_text_field" in self.args.given:
            raise ConfigError(f"SFTConfig.dataset_text_field = {field!r}: the rows have {', '.join(first)}")
        return None if self.args.assistant_only_loss or "messages" not in first else _TEXT

    def _check(self, values: Values, model: Any) -> None:
        """Refuse, in TRL's words, what can be refused before the model is loaded."""
        path = {"model.path": str(model)} if isinstance(model, str | Path) else {}
        try:
            config = build_config(self.args, {**values, **path})
            check_supervised(config, provided=["data.train", *([] if path else ["model.path"])])
        except ConfigError as error:
            raise in_trl_words(self.args, error) from error


def _formatted(rows: Sequence[SourceRow], function: Callable[[Any], str] | None) -> list[SourceRow]:
    if function is None:
        return list(rows)
    return [SourceRow({_TEXT: function(row.values)}, row.where) for row in rows]


def _rendered(row: SourceRow, tokenizer: Tokenizer) -> SourceRow:
    messages = row.values["messages"]
    return SourceRow({_TEXT: render(messages, tokenizer, template_kwargs={}, add_generation_prompt=False)}, row.where)
