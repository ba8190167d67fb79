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
from typing import Any, Generic, TypeAlias, TypeVar

from groupwise.engines.native.engine import Drawing
from groupwise.protocols import Tokenizer
from groupwise.serve.bodies import ChatBody, CompletionBody
from groupwise.serve.text import CALL_BEGINS, GrowingText, tool_calls, without_stop
from groupwise.types import Completion, Likeliest

Body = TypeVar("Body", ChatBody, CompletionBody)
Json = dict[str, Any]
Drawn: TypeAlias = Completion | Drawing

_NOTHING = Drawing((), ())


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
            "logprobs": self._logprobs(one),
        }
        return choice | {"token_ids": list(one.token_ids)} if self.body.return_token_ids else choice

    def _logprobs(self, drawn: Drawn) -> Json | None:
        if not self.body.logprobs:
            return None
        content = [
            self._entry(token_id, logprob) | {"top_logprobs": [self._entry(*pair) for pair in likeliest]}
            for token_id, logprob, likeliest in _positions(drawn)
        ]
        return {"content": content, "refusal": None}

    def _entry(self, token_id: int, logprob: float) -> Json:
        name = self._token(token_id)
        entry: Json = {"token": name, "logprob": logprob, "bytes": list(name.encode())}
        return entry | {"token_id": token_id} if self.body.names_tokens else entry

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
            yield self._chunk(self._told(_delta(index, {"content": shown}), drawn))

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

    def _told(self, choice: Json, drawn: Drawing) -> Json:
        choice["logprobs"] = self._logprobs(drawn)
        return choice | {"token_ids": list(drawn.token_ids)} if self.body.return_token_ids else choice


class CompletionForm(Form[CompletionBody]):
    kind, part_kind, prefix = "text_completion", "text_completion", "cmpl"

    def whole(self, drawn: Sequence[Completion], prompts: Sequence[tuple[int, ...]], usage: Usage) -> Json:
        choices = [
            self._choice(index, self._text(one), one)
            | {"finish_reason": one.finish_reason}
            | ({"prompt_token_ids": list(prompts[index // self.body.n])} if self.body.return_token_ids else {})
            for index, one in enumerate(drawn)
        ]
        return {**self._head, "object": self.kind, "choices": choices, "usage": usage.json}

    def _choice(self, index: int, text: str, drawn: Drawn) -> Json:
        choice: Json = {
            "index": index,
            "text": text,
            "finish_reason": None,
            "logprobs": self._logprobs(drawn),
        }
        return choice | {"token_ids": list(drawn.token_ids)} if self.body.return_token_ids else choice

    def _logprobs(self, drawn: Drawn) -> Json | None:
        if self.body.logprobs is None:
            return None
        offsets, place = list[int](), 0
        for token_id in drawn.token_ids:
            offsets.append(place)
            place += len(self._decode([token_id]))
        return {
            "tokens": [self._token(token_id) for token_id in drawn.token_ids],
            "token_logprobs": list(drawn.logprobs),
            "top_logprobs": [self._by_name(*each) for each in _positions(drawn)] if self.body.likeliest else None,
            "text_offset": offsets,
        }

    def _by_name(self, token_id: int, logprob: float, likeliest: Likeliest) -> dict[str, float]:
        """The drawn token is among them, also where it is none of the likeliest. Of tokens of one text, which are
        halves of characters, the more probable one is told; `return_token_ids` tells them apart."""
        named: dict[str, float] = {}
        for one, value in (*likeliest, (token_id, logprob)):
            named.setdefault(self._token(one), value)
        return named

    def begin(self, index: int, prompt: tuple[int, ...]) -> Iterator[Json]:
        if self.body.return_token_ids:
            yield self._chunk(self._choice(index, "", _NOTHING) | {"prompt_token_ids": list(prompt)})

    def part(self, index: int, growing: Growing, drawn: Drawing) -> Iterator[Json]:
        shown = growing.text.add(drawn.token_ids)
        if shown or self.body.logprobs is not None or self.body.return_token_ids:
            yield self._chunk(self._choice(index, shown, drawn))

    def end(self, index: int, growing: Growing, completion: Completion) -> Iterator[Json]:
        rest = self._choice(index, growing.text.end(), _NOTHING)
        yield self._chunk(rest | {"finish_reason": completion.finish_reason})


def _positions(drawn: Drawn) -> Iterator[tuple[int, float, Likeliest]]:
    """Each token with its log-prob and the likeliest there."""
    likeliest = drawn.likeliest or ((),) * len(drawn.token_ids)
    return zip(drawn.token_ids, drawn.logprobs, likeliest, strict=True)


def _delta(index: int, delta: Json) -> Json:
    return {"index": index, "delta": delta, "finish_reason": None, "logprobs": None}
