"""What a row must look like, checked without a tokenizer, so that bad data is refused before a model loads.

A problem is a sentence, not an exception: `groupwise data stats` counts problems, training refuses the first.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from groupwise.config.data import DataConfig
from groupwise.data.files import SourceRow
from groupwise.errors import ConfigError, DataError, nearest
from groupwise.types import Message

SYSTEM_ROLES = ("system", "developer")


@dataclass(frozen=True, slots=True)
class RowProblem:
    """Why a row cannot be used.

    Example:
        RowProblem(where="train.jsonl:17", reason='the column "prompt" is empty')
    """

    where: str
    reason: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


def find_problems(
    rows: Iterable[SourceRow], problem_of: Callable[[Mapping[str, Any]], str | None]
) -> tuple[RowProblem, ...]:
    """Every row that `problem_of` finds fault with, in order."""
    found = ((row.where, problem_of(row.values)) for row in rows)
    return tuple(RowProblem(where, reason) for where, reason in found if reason is not None)


def refuse(problems: Sequence[RowProblem]) -> None:
    """Raise on the first problem and say how many more there are.

    Raises:
        DataError: there is at least one problem.
    """
    if problems:
        more = f" ({len(problems) - 1} more rows have problems)" if len(problems) > 1 else ""
        raise DataError(f"{problems[0]}{more}")


def check_settings(config: DataConfig) -> None:
    """Check what the `data` section says about messages.

    Raises:
        ConfigError: a few-shot message is malformed, or the system prompt is blank.
    """
    if config.system_prompt is not None and not config.system_prompt.strip():
        raise ConfigError("data.system_prompt is blank; remove it, or write what the model is to be told")
    for index, message in enumerate(config.few_shot):
        problem = message_problem(message, f"data.few_shot[{index}]")
        if problem is not None:
            raise ConfigError(problem)
        if message["role"] in SYSTEM_ROLES:
            raise ConfigError(f"data.few_shot[{index}] is a system message; put its text into data.system_prompt")


def missing_column(name: str, values: Mapping[str, Any], *, setting: str) -> str:
    """The sentence for a column that a setting names and a row lacks."""
    present = ", ".join(values) or "no columns"
    near = nearest(name, values, '; did you mean "{}"?')
    return f'there is no column "{name}" ({setting}); the row has {present}{near}'


def text_problem(value: Any, name: str) -> str | None:
    """Why `value` is not usable text, or None."""
    if isinstance(value, float) and math.isnan(value):
        return f"{name} is NaN, as an empty cell of a table becomes; expected text"
    if not isinstance(value, str):
        return f"{name} is {_kind(value)}; expected text"
    if not value.strip():
        return f"{name} is empty; expected text"
    return _encoding_problem(value, name)


def message_problem(message: Any, name: str) -> str | None:
    """Why `message` is not `{"role": …, "content": text}`, or None. Blank content is allowed."""
    if not isinstance(message, Mapping):
        return f'{name} is {_kind(message)}; expected a message such as {{"role": "user", "content": "…"}}'
    entries: Mapping[str, Any] = message
    for key in ("role", "content"):
        if key not in entries:
            keys = ", ".join(map(str, entries)) or "nothing"
            return f'{name} has no "{key}", only {keys}; a message has role and content'
        if not isinstance(entries[key], str):
            return f'{name} has a "{key}" that is {_kind(entries[key])}; expected text'
    if not entries["role"].strip():
        return f"{name} has an empty role; expected system, user, assistant or tool"
    return _encoding_problem(entries["content"], name)


def messages_problem(value: Any, name: str) -> str | None:
    """Why `value` is not a conversation with something in it, or None."""
    if not isinstance(value, list | tuple):
        return f"{name} is {_kind(value)}; expected text or a list of messages"
    if not value:
        return f"{name} is an empty list; expected at least one message"
    for index, message in enumerate(value):
        problem = message_problem(message, f"{name}[{index}]")
        if problem is not None:
            return problem
    if not any(message["content"].strip() for message in value if message["role"] not in SYSTEM_ROLES):
        return f"{name} is empty: none of its messages says anything"
    return None


def prompt_problem(values: Mapping[str, Any], config: DataConfig) -> str | None:
    """Why a row gives no prompt, or None."""
    if config.answer_column is not None:
        if config.answer_column not in values:
            return missing_column(config.answer_column, values, setting="data.answer_column")
        if values[config.answer_column] is None:
            return f'the column "{config.answer_column}" (data.answer_column) is null; expected the answer'
    return data_source_problem(values) or _question_problem(values, config)


def data_source_problem(values: Mapping[str, Any]) -> str | None:
    """Why the row's `data_source` routes nowhere, or None; a missing or null one is fine."""
    source = values.get("data_source")
    return None if source is None else text_problem(source, 'the column "data_source"')


def _question_problem(values: Mapping[str, Any], config: DataConfig) -> str | None:
    if config.question_column is not None:
        if config.question_column not in values:
            return missing_column(config.question_column, values, setting="data.question_column")
        return text_problem(values[config.question_column], f'the column "{config.question_column}"')
    if config.prompt_column not in values:
        problem = missing_column(config.prompt_column, values, setting="data.prompt_column")
        return f"{problem}. Set data.prompt_column, or data.question_column for plain questions"
    value, name = values[config.prompt_column], f'the column "{config.prompt_column}"'
    if isinstance(value, list | tuple):
        return messages_problem(value, name) or _last_turn_problem(value, name)
    return text_problem(value, name) or chat_settings_problem(config)


def _last_turn_problem(messages: Sequence[Message], name: str) -> str | None:
    last = messages[-1]["role"]
    if last in ("assistant", *SYSTEM_ROLES):
        return f"{name} ends with a message of the {last}; a prompt ends where the model is to answer, with the user's"
    return None


def chat_settings_problem(config: DataConfig) -> str | None:
    """Why plain text cannot follow settings that only messages can, or None."""
    settings = {
        "data.system_prompt": config.system_prompt,
        "data.few_shot": config.few_shot,
        "data.chat_template_kwargs": config.chat_template_kwargs,
    }
    for name, value in settings.items():
        if value:
            return (
                f"the prompt is plain text, so {name} cannot act on it; remove that setting, give the prompt as "
                f'messages, or set data.question_column = "{config.prompt_column}" to make the text the user\'s message'
            )
    return None


def clean_messages(messages: Iterable[Message]) -> tuple[Message, ...]:
    """Messages as plain dicts without null entries, which columnar files add to make all messages alike."""
    return tuple({key: value for key, value in message.items() if value is not None} for message in messages)


def prompt_value(values: Mapping[str, Any], config: DataConfig) -> str | tuple[Message, ...]:
    """What the row asks, as the data has it: text, or messages. The row passed `prompt_problem`."""
    if config.question_column is not None:
        return ({"role": "user", "content": values[config.question_column]},)
    value = values[config.prompt_column]
    return value if isinstance(value, str) else clean_messages(value)


def with_context(messages: Sequence[Message], config: DataConfig) -> tuple[Message, ...]:
    """The conversation after the system prompt (its own, if it has one) and the few-shot messages."""
    has_system = any(message["role"] in SYSTEM_ROLES for message in messages)
    head: tuple[Message, ...] = ()
    if not has_system and config.system_prompt is not None:
        head = ({"role": "system", "content": config.system_prompt},)
    elif messages[0]["role"] in SYSTEM_ROLES:
        head, messages = (messages[0],), messages[1:]
    return (*head, *(dict(message) for message in config.few_shot), *messages)


def data_source_of(values: Mapping[str, Any], config: DataConfig) -> str:
    """The row's own data_source, else the configured one, else `default`."""
    return values.get("data_source") or config.data_source or "default"


def row_uid(index: int, prompt: str | Sequence[Message]) -> str:
    """A name that depends on the row's position and on what it asks, not on system prompt, template or other rows."""
    return f"{index:06d}-{hashlib.blake2s(prompt_key(prompt).encode()).hexdigest()[:8]}"


def prompt_key(prompt: str | Sequence[Message]) -> str:
    """Equal for prompts that ask the same, whatever the order of keys in their messages and wherever images lie."""
    return json.dumps(prompt, sort_keys=True, default=_key_of)


def _key_of(value: Any) -> Any:
    """What stands for a value that JSON does not know: its content, never its address in memory.

    Raises:
        DataError: nothing about the value but its address is known.
    """
    if isinstance(value, bytes | bytearray | memoryview):
        return f"bytes {_digest(bytes(value))}"
    if isinstance(value, set | frozenset):  # another order in every process
        return sorted(map(prompt_key, value))
    if hasattr(value, "tobytes") and hasattr(value, "mode"):  # an image, whatever file it came from
        palette = bytes(getattr(value, "getpalette", lambda: None)() or ())
        return f"image {value.size} {value.mode} {_digest(value.tobytes() + palette)}"
    if hasattr(value, "tobytes") and hasattr(value, "dtype"):
        if str(value.dtype) == "object":  # its bytes are addresses
            return value.tolist()
        return f"array {value.shape} {value.dtype} {_digest(value.tobytes())}"
    text = str(value)
    if re.search(r" at 0x[0-9a-fA-F]+", text) or f"{id(value):x}" in text.lower() or str(id(value)) in text:
        raise DataError(f"a message holds {text}, which no other process would know again; give text, or an image")
    return text


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _encoding_problem(text: str, name: str) -> str | None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return f"{name} has half of a surrogate pair at character {error.start + 1}, which is no text; drop the row"
    return None


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    return {dict: "an object", list: "a list", bool: "a boolean", int: "a number", float: "a number"}.get(
        type(value), f"a {type(value).__name__}"
    )
