"""Answers in the form that OpenAI's clients read: of chats and of completions, whole and in parts.

With `return_token_ids` tokens come as numbers: the prompt's in `prompt_token_ids`, an answer's in its `token_ids`, and
each log-prob names its token twice, `"token": "token_id:17"` and `"token_id": 17`, as clients read one or the other.
"""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from groupwise.engines.native.engine import Drawing
from groupwise.protocols import Tokenizer
from groupwise.serve.bodies import ChatBody, CompletionBody
from groupwise.serve.text import CALL_BEGINS, GrowingText, tool_calls, without_stop
from groupwise.types import Completion

Body = TypeVar("Body", ChatBody, CompletionBody)
Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int

    @staticmethod
    def of(prompts: Sequence[Sequence[int]], counts: Sequence[int]) -> Usage:
        """Every prompt counts once."""
        return Usage(sum(map(len, prompts)), sum(counts))

    @property
    def json(self) -> Json:
        total = self.prompt_tokens + self.completion_tokens
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": total,
        }


@dataclass(slots=True)
class Growing:
    """One answer that is being written.

    Attributes:
        tokens: that were told already.
        said: text that was shown.
    """

    text: GrowingText
    tokens: list[int] = field(default_factory=list[int])
    logprobs: list[float] = field(default_factory=list[float])
    said: str = ""


class Form(ABC, Generic[Body]):
    """What the answers to one request look like.

    Args:
        version: of the weights; clients see it as the fingerprint of the system.
    """

    kind = ""
    part_kind = ""
    prefix = ""

    def __init__(self, model: str, version: int, body: Body, tokenizer: Tokenizer) -> None:
        self.body = body
        self._tokenizer = tokenizer
        self._head: Json = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": f"groupwise-v{version}",
        }

    @abstractmethod
    def whole(self, drawn: Sequence[Completion], prompts: Sequence[tuple[int, ...]], usage: Usage) -> Json:
        """The answer to a request that did not ask for parts."""

    @abstractmethod
    def begin(self, index: int, prompt: tuple[int, ...]) -> Iterator[Json]:
        """What is said before a choice's first token."""

    @abstractmethod
    def part(self, index: int, growing: Growing, drawn: Drawing) -> Iterator[Json]:
        """What is said of tokens that were just drawn."""

    @abstractmethod
    def end(self, index: int, growing: Growing, completion: Completion) -> Iterator[Json]:
        """What is said when a choice is whole."""

    def growing(self) -> Growing:
        """Of one choice."""
        stops = () if self.body.include_stop_str_in_output else self.body.stops
        return Growing(GrowingText(self._decode, stops=stops, holds=self._held))

    @property
    def _held(self) -> Sequence[str]:
        return ()

    def usage(self, usage: Usage) -> Json:
        """The part that says how much it was."""
        return {**self._head, "object": self.part_kind, "choices": [], "usage": usage.json}

    def _chunk(self, choice: Json) -> Json:
        return {**self._head, "object": self.part_kind, "choices": [choice]}

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=self.body.skip_special_tokens is not False)

    def _text(self, completion: Completion) -> str:
        text = self._decode(completion.token_ids)
        return text if self.body.include_stop_str_in_output else without_stop(text, self.body.stops)

    def _token(self, token_id: int) -> str:
        if self.body.names_tokens:
            return f"token_id:{token_id}"
        return self._tokenizer.decode([token_id], skip_special_tokens=False)


class ChatForm(Form[ChatBody]):
    kind, part_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def whole(self, drawn: Sequence[Completion], prompts: Sequence[tuple[int, ...]], usage: Usage) -> Json:
        answer = {
            **self._head,
            "object": self.kind,
            "choices": [self._choice(index, one) for index, one in enumerate(drawn)],
            "usage": usage.json,
        }
        return answer | {"prompt_token_ids": list(prompts[0])} if self.body.return_token_ids else answer

    def _choice(self, index: int, one: Completion) -> Json:
        text, calls = self._text(one), list[Json]()
        if self.body.template_tools:
            text, calls = tool_calls(text)
        message: Json = {"role": "assistant", "content": text if text or not calls else None}
        if calls:
            message["tool_calls"] = calls
        choice: Json = {
            "index": index,
            "message": message,
            "finish_reason": "tool_calls" if calls and one.finish_reason == "stop" else one.finish_reason,
            "logprobs": self._logprobs(one.token_ids, one.logprobs),
        }
        return choice | {"token_ids": list(one.token_ids)} if self.body.return_token_ids else choice

    def _logprobs(self, token_ids: Sequence[int], logprobs: Sequence[float]) -> Json | None:
        if not self.body.logprobs:
            return None
        content: list[Json] = []
        for token_id, logprob in zip(token_ids, logprobs, strict=True):
            name = self._token(token_id)
            entry = {"token": name, "logprob": logprob, "bytes": list(name.encode()), "top_logprobs": []}
            content.append(entry | {"token_id": token_id} if self.body.names_tokens else entry)
        return {"content": content, "refusal": None}

    @property
    def _held(self) -> Sequence[str]:
        return (CALL_BEGINS,) if self.body.template_tools else ()

    def begin(self, index: int, prompt: tuple[int, ...]) -> Iterator[Json]:
        chunk = self._chunk(_delta(index, {"role": "assistant", "content": ""}))
        yield chunk | {"prompt_token_ids": list(prompt)} if self.body.return_token_ids else chunk

    def part(self, index: int, growing: Growing, drawn: Drawing) -> Iterator[Json]:
        shown = growing.text.add(drawn.token_ids)
        growing.said += shown
        growing.tokens += drawn.token_ids
        if shown or self.body.logprobs or self.body.return_token_ids:
            yield self._chunk(self._told(_delta(index, {"content": shown}), drawn.token_ids, drawn.logprobs))

    def end(self, index: int, growing: Growing, completion: Completion) -> Iterator[Json]:
        rest, calls = growing.text.end(), list[Json]()
        if self.body.template_tools:
            rest, calls = tool_calls(rest)
        if rest:
            yield self._chunk(_delta(index, {"content": rest}))
        for number, call in enumerate(calls):
            yield self._chunk(_delta(index, {"tool_calls": [{"index": number, **call}]}))
        reason = "tool_calls" if calls and completion.finish_reason == "stop" else completion.finish_reason
        yield self._chunk(_delta(index, {}) | {"finish_reason": reason})

    def _told(self, choice: Json, token_ids: Sequence[int], logprobs: Sequence[float]) -> Json:
        choice["logprobs"] = self._logprobs(token_ids, logprobs)
        return choice | {"token_ids": list(token_ids)} if self.body.return_token_ids else choice


class CompletionForm(Form[CompletionBody]):
    kind, part_kind, prefix = "text_completion", "text_completion", "cmpl"

    def whole(self, drawn: Sequence[Completion], prompts: Sequence[tuple[int, ...]], usage: Usage) -> Json:
        choices = [
            self._choice(index, self._text(one), one.token_ids, one.logprobs)
            | {"finish_reason": one.finish_reason}
            | ({"prompt_token_ids": list(prompts[index // self.body.n])} if self.body.return_token_ids else {})
            for index, one in enumerate(drawn)
        ]
        return {**self._head, "object": self.kind, "choices": choices, "usage": usage.json}

    def _choice(self, index: int, text: str, token_ids: Sequence[int], logprobs: Sequence[float]) -> Json:
        choice: Json = {
            "index": index,
            "text": text,
            "finish_reason": None,
            "logprobs": self._logprobs(token_ids, logprobs),
        }
        return choice | {"token_ids": list(token_ids)} if self.body.return_token_ids else choice

    def _logprobs(self, token_ids: Sequence[int], logprobs: Sequence[float]) -> Json | None:
        if self.body.logprobs is None:
            return None
        names = [self._token(token_id) for token_id in token_ids]
        offsets, place = list[int](), 0
        for token_id in token_ids:
            offsets.append(place)
            place += len(self._decode([token_id]))
        return {"tokens": names, "token_logprobs": list(logprobs), "top_logprobs": None, "text_offset": offsets}

    def begin(self, index: int, prompt: tuple[int, ...]) -> Iterator[Json]:
        if self.body.return_token_ids:
            yield self._chunk(self._choice(index, "", (), ()) | {"prompt_token_ids": list(prompt)})

    def part(self, index: int, growing: Growing, drawn: Drawing) -> Iterator[Json]:
        shown = growing.text.add(drawn.token_ids)
        if shown or self.body.logprobs is not None or self.body.return_token_ids:
            yield self._chunk(self._choice(index, shown, drawn.token_ids, drawn.logprobs))

    def end(self, index: int, growing: Growing, completion: Completion) -> Iterator[Json]:
        yield self._chunk(self._choice(index, growing.text.end(), (), ()) | {"finish_reason": completion.finish_reason})


def _delta(index: int, delta: Json) -> Json:
    return {"index": index, "delta": delta, "finish_reason": None, "logprobs": None}
