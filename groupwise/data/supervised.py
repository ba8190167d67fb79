"""Worked answers to training rows: the loss is on what the assistant says, the prompt is what it will be asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

from groupwise.batches import TrainingRow
from groupwise.config.data import DataConfig
from groupwise.data.chat import (
    EncodedConversation,
    check_template,
    encode_conversation,
    encode_text_pair,
    encode_whole_text,
    say_missing_start,
)
from groupwise.data.files import Source, SourceRow, read_rows
from groupwise.data.rows import (
    SYSTEM_ROLES,
    chat_settings_problem,
    check_settings,
    clean_messages,
    find_problems,
    messages_problem,
    missing_column,
    prompt_problem,
    prompt_value,
    refuse,
    text_problem,
    with_context,
)
from groupwise.errors import DataError
from groupwise.inputs import ModelInput
from groupwise.metrics import Last, Metric
from groupwise.protocols import Tokenizer
from groupwise.types import Message


@dataclass(frozen=True, slots=True)
class SupervisedSet:
    """What one source gave to learn from.

    Attributes:
        rows: one per usable row, in the source's order; `group` is the row's position in the source.
        num_rows: rows read.
        num_too_long: rows left out: more than `max_tokens` tokens, or a prompt of more than `data.max_prompt_tokens`.
        num_untrained_turns: earlier assistant turns without loss, because the chat template rewrites them later.

    Example:
        SupervisedSet(rows=(row,), num_rows=2, num_too_long=1, num_untrained_turns=0)
    """

    rows: tuple[TrainingRow, ...]
    num_rows: int
    num_too_long: int
    num_untrained_turns: int

    @property
    def metrics(self) -> dict[str, Metric]:
        return {"data/conversations": Last(len(self.rows)), "data/conversations_too_long": Last(self.num_too_long)}

    def describe(self) -> str:
        """One line for the terminal."""
        lengths = [row.num_tokens for row in self.rows]
        learned = sum(sum(row.loss_mask) for row in self.rows)
        line = f"{len(lengths):,} conversations of {min(lengths):,} to {max(lengths):,} tokens; {learned:,} are learned"
        if self.num_too_long:
            line += f"; left out {self.num_too_long:,} of {self.num_rows:,} rows as too long"
        if self.num_untrained_turns:
            line += f"; {self.num_untrained_turns:,} earlier turns carry no loss, since the chat template rewrites them"
        return line


@dataclass(frozen=True, slots=True)
class _Text:
    text: str


@dataclass(frozen=True, slots=True)
class _TextPair:
    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class _Turns:
    """Messages that are given, and those that follow and are learned."""

    prompt: tuple[Message, ...]
    completion: tuple[Message, ...]


def check_supervised_rows(rows: Sequence[SourceRow], config: DataConfig, *, text_column: str | None = None) -> None:
    """Check that every row has an answer to learn, or a text in `text_column`, without a tokenizer.

    Raises:
        ConfigError: `data.few_shot` or `data.system_prompt` is malformed.
        DataError: a row is bad; names the first and counts the others.
    """
    check_settings(config)
    if text_column is None:
        refuse(find_problems(rows, partial(supervised_problem, config=config)))
    else:
        refuse(find_problems(rows, partial(_text_row_problem, column=text_column)))


def load_supervised(
    source: Source, config: DataConfig, tokenizer: Tokenizer, *, max_tokens: int, text_column: str | None = None
) -> SupervisedSet:
    """Read, check and tokenize conversations to learn.

    A row is, in this order: a question and an answer (`config.question_column`, `config.answer_column`); a prompt and
    an answer (`config.prompt_column`, `config.answer_column`); `prompt` and `completion`, both text or both messages; a
    conversation in `messages`, or in `config.prompt_column`, that ends with the assistant; a prompt with the worked
    answer in `extra_info.answer`, as GSM8K has it in the RL format. With `text_column` it is a whole text, all of it
    learned but its first token.

    Args:
        max_tokens: rows with more tokens, prompt included, are left out and counted.

    Raises:
        ConfigError: messages without a chat template, or nothing that ends an answer.
        DataError: the source or a row is bad, or every row is too long.
    """
    rows = read_rows(source)
    check_supervised_rows(rows, config, text_column=text_column)
    worked = [_worked(row.values, config) if text_column is None else _Text(row.values[text_column]) for row in rows]
    if any(isinstance(item, _Turns) for item in worked):
        check_template(tokenizer, config.chat_template_kwargs)
    encoded = [_encode(item, row, config=config, tokenizer=tokenizer) for item, row in zip(worked, rows, strict=True)]
    turns = (one.prompt_ids for one, item in zip(encoded, worked, strict=True) if isinstance(item, _Turns))
    say_missing_start(next(turns, None), tokenizer)
    kept = [(index, item) for index, item in enumerate(encoded) if _fits(item, config, max_tokens=max_tokens)]
    if not kept:
        raise DataError(_all_too_long(encoded, config, max_tokens=max_tokens))
    return SupervisedSet(
        rows=tuple(_training_row(index, item) for index, item in kept),
        num_rows=len(rows),
        num_too_long=len(rows) - len(kept),
        num_untrained_turns=sum(item.num_untrained_turns for _, item in kept),
    )


def _text_row_problem(values: Mapping[str, Any], column: str) -> str | None:
    if column not in values:
        return missing_column(column, values, setting="sft.text_column")
    return text_problem(values[column], f'the column "{column}" (sft.text_column)')


def supervised_problem(values: Mapping[str, Any], config: DataConfig) -> str | None:
    """Why a row gives nothing to learn, or None."""
    if config.question_column is None and config.answer_column is None:
        if "completion" in values:
            return _completion_problem(values, config)
        name = _conversation_column(values, config)
        if name is not None:
            return _conversation_problem(values[name], f'the column "{name}"')
    problem = prompt_problem(values, config)
    if problem is not None:
        return problem
    if config.answer_column is not None:
        return text_problem(values[config.answer_column], f'the column "{config.answer_column}" (data.answer_column)')
    extra = values.get("extra_info")
    if isinstance(extra, Mapping) and "answer" in extra:
        return text_problem(extra["answer"], '"answer" in the column "extra_info"')
    return (
        f"there is no answer to learn; the row has {', '.join(values)}. Expected messages, prompt and completion, or "
        "extra_info.answer; or set data.answer_column to the column with the answer"
    )


def _conversation_column(values: Mapping[str, Any], config: DataConfig) -> str | None:
    """The column with a whole conversation; a prompt that ends with the user is none."""
    value = values.get(config.prompt_column)
    last = value[-1] if isinstance(value, list | tuple) and value else None
    if isinstance(last, Mapping) and last.get("role") == "assistant":
        return config.prompt_column
    return "messages" if "messages" in values else None


def _conversation_problem(value: Any, name: str) -> str | None:
    if isinstance(value, str):
        return f"{name} is text; expected a list of messages"
    problem = messages_problem(value, name)
    if problem is not None:
        return problem
    if value[-1]["role"] != "assistant":
        return f"{name} ends with a message of the {value[-1]['role']}; expected the assistant's answer at the end"
    if next(message["role"] for message in value if message["role"] not in SYSTEM_ROLES) == "assistant":
        return f"{name} begins with the assistant; expected a message to answer first"
    return text_problem(value[-1]["content"], f"the assistant's last message in {name}")


def _completion_problem(values: Mapping[str, Any], config: DataConfig) -> str | None:
    if config.prompt_column not in values:
        return missing_column(config.prompt_column, values, setting="data.prompt_column")
    prompt, completion = values[config.prompt_column], values["completion"]
    name = f'the column "{config.prompt_column}"'
    if isinstance(prompt, str):
        return (
            text_problem(prompt, name)
            or text_problem(completion, 'the column "completion"')
            or chat_settings_problem(config)
        )
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    problem = messages_problem(prompt, name) or messages_problem(completion, 'the column "completion"')
    return problem or _conversation_problem([*prompt, *completion], f'{name} with "completion"')


def _worked(values: Mapping[str, Any], config: DataConfig) -> _TextPair | _Turns:
    if config.question_column is None and config.answer_column is None:
        if "completion" in values:
            return _pair(_cleaned(values[config.prompt_column]), _cleaned(values["completion"]))
        name = _conversation_column(values, config)
        if name is not None:
            return _split_conversation(clean_messages(values[name]))
    prompt = prompt_value(values, config)
    answer = values["extra_info"]["answer"] if config.answer_column is None else values[config.answer_column]
    return _pair(prompt, answer)


def _cleaned(value: Any) -> str | tuple[Message, ...]:
    return value if isinstance(value, str) else clean_messages(value)


def _pair(prompt: str | tuple[Message, ...], completion: str | tuple[Message, ...]) -> _TextPair | _Turns:
    if isinstance(prompt, str):
        assert isinstance(completion, str), "a text prompt has a text completion, or the check refused the row"
        return _TextPair(prompt, completion)
    if isinstance(completion, str):
        completion = ({"role": "assistant", "content": completion},)
    return _Turns(prompt, completion)


def _split_conversation(messages: tuple[Message, ...]) -> _Turns:
    first = next(i for i, message in enumerate(messages) if message["role"] == "assistant")
    return _Turns(messages[:first], messages[first:])


def _encode(
    item: _Text | _TextPair | _Turns, row: SourceRow, *, config: DataConfig, tokenizer: Tokenizer
) -> EncodedConversation:
    if isinstance(item, _Text):
        encoded = encode_whole_text(item.text, tokenizer)
    elif isinstance(item, _TextPair):
        encoded = encode_text_pair(item.prompt, item.completion, tokenizer=tokenizer)
    else:
        context = clean_messages(with_context(item.prompt, config))
        try:
            encoded = encode_conversation(
                (*context, *item.completion),
                tokenizer,
                template_kwargs=config.chat_template_kwargs,
                num_context=len(context),
            )
        except DataError as error:
            raise DataError(f"{row.where}: {error}") from error
    if not encoded.prompt_ids:
        raise DataError(f"{row.where}: the tokenizer makes no tokens of the prompt; mend or drop the row")
    return encoded


def _fits(item: EncodedConversation, config: DataConfig, *, max_tokens: int) -> bool:
    return len(item.prompt_ids) <= config.max_prompt_tokens and _length(item) <= max_tokens


def _length(item: EncodedConversation) -> int:
    return len(item.prompt_ids) + len(item.token_ids)


def _training_row(index: int, item: EncodedConversation) -> TrainingRow:
    n = len(item.token_ids)
    return TrainingRow(
        group=index,
        prompt=ModelInput.of(item.prompt_ids),
        follows=ModelInput.of(item.token_ids),
        loss_mask=item.loss_mask,
        advantages=(1.0,) * n,
        logprobs=(0.0,) * n,
    )


def _all_too_long(encoded: Sequence[EncodedConversation], config: DataConfig, *, max_tokens: int) -> str:
    whole = [_length(item) for item in encoded]
    prompts = [len(item.prompt_ids) for item in encoded]
    return (
        f"every conversation is too long: they have {min(whole):,} to {max(whole):,} tokens, median "
        f"{median(whole):,.0f} (sft.max_tokens = {max_tokens:,}), with prompts of {min(prompts):,} to {max(prompts):,} "
        f"(data.max_prompt_tokens = {config.max_prompt_tokens:,}); raise the setting that is too low"
    )
