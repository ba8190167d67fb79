"""Rows to prompts: three shapes of data in, one `Prompt` out, too long ones left out and counted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

from groupwise.config.data import DataConfig
from groupwise.data.chat import check_template, encode_rendered, encode_text, render, say_missing_start
from groupwise.data.files import Source, SourceRow, read_rows
from groupwise.data.rows import (
    check_settings,
    clean_messages,
    data_source_of,
    find_problems,
    prompt_problem,
    prompt_value,
    refuse,
    row_uid,
    with_context,
)
from groupwise.errors import DataError
from groupwise.inputs import ModelInput
from groupwise.metrics import Last, Metric
from groupwise.protocols import Tokenizer
from groupwise.types import Prompt


@dataclass(frozen=True, slots=True)
class PromptSet:
    """What one source gave.

    Attributes:
        prompts: the usable rows, in the source's order; at least one.
        num_rows: rows read.
        num_too_long: rows left out, with more than `max_prompt_tokens` tokens.

    Example:
        PromptSet(prompts=(prompt,), num_rows=2, num_too_long=1, max_prompt_tokens=1024)
    """

    prompts: tuple[Prompt, ...]
    num_rows: int
    num_too_long: int
    max_prompt_tokens: int

    @property
    def metrics(self) -> dict[str, Metric]:
        return {"data/prompts": Last(len(self.prompts)), "data/prompts_too_long": Last(self.num_too_long)}

    def describe(self) -> str:
        """One line for the terminal."""
        lengths = [len(prompt.token_ids) for prompt in self.prompts]
        span = f"{min(lengths):,} to {max(lengths):,} tokens (median {median(lengths):,.0f})"
        line = f"{len(lengths):,} prompts of {span}"
        if self.num_too_long:
            line += (
                f"; left out {self.num_too_long:,} of {self.num_rows:,} rows: over {self.max_prompt_tokens:,} tokens"
            )
        return line


def check_rows(rows: Sequence[SourceRow], config: DataConfig) -> None:
    """Check that every row gives a prompt, without a tokenizer, so that bad data is refused before a model loads.

    Raises:
        ConfigError: `data.few_shot` or `data.system_prompt` is malformed.
        DataError: a row lacks a column, has a malformed or empty prompt, …; names the first and counts the others.
    """
    check_settings(config)
    refuse(find_problems(rows, partial(prompt_problem, config=config)))


def load_prompts(source: Source, config: DataConfig, tokenizer: Tokenizer, *, limit: int | None = None) -> PromptSet:
    """Read, check, render and tokenize the rows of `source`, or its first `limit`.

    A row is text or messages in `config.prompt_column`, or a question in `config.question_column`. Its other columns,
    whatever they are, go to the rewards as they are; `config.answer_column` is there a second time, as `answer`.

    Raises:
        ConfigError: messages without a chat template, or template keywords that do nothing.
        DataError: the source or a row is bad, or every prompt is too long.
    """
    rows = read_rows(source, limit=limit)
    check_rows(rows, config)
    if any(not isinstance(prompt_value(row.values, config), str) for row in rows):
        check_template(tokenizer, config.chat_template_kwargs)
    made = [make_prompt(row, index, config=config, tokenizer=tokenizer) for index, row in enumerate(rows)]
    say_missing_start(next((prompt.token_ids for prompt in made if prompt.messages), None), tokenizer)
    kept = tuple(prompt for prompt in made if len(prompt.token_ids) <= config.max_prompt_tokens)
    if not kept:
        raise DataError(_all_too_long([len(prompt.token_ids) for prompt in made], config.max_prompt_tokens))
    return PromptSet(kept, len(rows), len(rows) - len(kept), config.max_prompt_tokens)


def make_prompt(row: SourceRow, index: int, *, config: DataConfig, tokenizer: Tokenizer | None) -> Prompt:
    """The prompt of a row that passed `check_rows`; `index` is its position in the source.

    Args:
        tokenizer: None gives one for who only judges answers: without tokens, its text that of the messages.

    Raises:
        DataError: the chat template refuses the row, or the tokenizer makes nothing of it.
    """
    asked = prompt_value(row.values, config)
    messages = () if isinstance(asked, str) else clean_messages(with_context(asked, config))
    token_ids: Sequence[int] = ()
    if tokenizer is None:
        text = asked if isinstance(asked, str) else "\n".join(str(message["content"]) for message in messages)
    elif isinstance(asked, str):
        text = asked
        token_ids = encode_text(text, tokenizer)
    else:
        try:
            text = render(messages, tokenizer, template_kwargs=config.chat_template_kwargs)
        except DataError as error:
            raise DataError(f"{row.where}: {error}") from error
        token_ids = encode_rendered(text, tokenizer)
    if tokenizer is not None and not token_ids:
        raise DataError(f"{row.where}: the tokenizer makes no tokens of the prompt {text[:40]!r}; mend or drop the row")
    return Prompt(
        uid=row_uid(index, asked),
        messages=messages,
        text=text,
        input=ModelInput.of(token_ids),
        data_source=data_source_of(row.values, config),
        columns=_columns(row.values, config),
    )


def _columns(values: Mapping[str, Any], config: DataConfig) -> dict[str, Any]:
    columns = dict(values)
    if config.answer_column is not None:
        columns["answer"] = values[config.answer_column]
    return columns


def _all_too_long(lengths: Sequence[int], max_prompt_tokens: int) -> str:
    return (
        f"every prompt is longer than data.max_prompt_tokens = {max_prompt_tokens:,}: they have {min(lengths):,} to "
        f"{max(lengths):,} tokens, median {median(lengths):,.0f}; raise it to {max(lengths):,} to keep them all"
    )
