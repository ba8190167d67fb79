"""From tokens that come one by one to text that a reader can have already, and to the tools that it calls."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, cast

from groupwise.texts import encodable

Decode = Callable[[Sequence[int]], str]

_CALL = re.compile(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", re.DOTALL)
CALL_BEGINS = "<tool_call>"


class GrowingText:
    """The text of tokens so far, without what may still change: half a character, or the beginning of a stop string.

    Args:
        holds: strings that are not shown while they may be beginning; `stops` end the text, and are not part of it.

    Example:
        text = GrowingText(decode, stops=("###",))
        text.add([5, 6])    # what can be shown of them
        text.end()          # the rest
    """

    def __init__(self, decode: Decode, *, stops: Sequence[str] = (), holds: Sequence[str] = ()) -> None:
        self._decode = decode
        self._stops = tuple(stops)
        self._held = (*stops, *holds)
        self._tokens: list[int] = []
        self._begun, self._read = 0, 0  # what is decoded again, for its neighbours, and what is known
        self._text = ""
        self._shown = 0
        self.stopped = False

    def add(self, token_ids: Sequence[int]) -> str:
        """What can be shown now and could not before."""
        self._tokens += token_ids
        known = self._decode(self._tokens[self._begun : self._read])
        now = self._decode(self._tokens[self._begun :])
        if len(now) > len(known) and not now.endswith("\ufffd"):
            self._text += now[len(known) :]
            self._begun, self._read = self._read, len(self._tokens)
        return self._show(final=False)

    def end(self) -> str:
        """What is left to show."""
        known = self._decode(self._tokens[self._begun : self._read])
        self._text += self._decode(self._tokens[self._begun :])[len(known) :]
        self._begun = self._read = len(self._tokens)
        return self._show(final=True)

    def _show(self, *, final: bool) -> str:
        if self.stopped:
            return ""
        found = [place for stop in self._stops if (place := self._text.find(stop, max(0, self._shown))) >= 0]
        if found:
            self._text, self.stopped, final = self._text[: min(found)], True, True
        until = len(self._text) if final else len(self._text) - _overlap(self._text, self._held)
        shown, self._shown = self._text[self._shown : until], max(self._shown, until)
        return shown


def _overlap(text: str, strings: Sequence[str]) -> int:
    """The longest end of the text with which one of the strings begins, or the place from where it stands in it."""
    longest = 0
    for string in strings:
        if (place := text.find(string)) >= 0:
            longest = max(longest, len(text) - place)
            continue
        for size in range(min(len(string) - 1, len(text)), 0, -1):
            if text.endswith(string[:size]):
                longest = max(longest, size)
                break
    return longest


def without_stop(text: str, stops: Sequence[str]) -> str:
    """Up to the first stop string, which clients of OpenAI do not get."""
    found = [place for stop in stops if (place := text.find(stop)) >= 0]
    return text[: min(found)] if found else text


def tool_calls(text: str) -> tuple[str, list[dict[str, Any]]]:
    """The text without its calls, and these, as OpenAI writes them; the form is Hermes' and Qwen's. What is no call of
    that form stays text."""
    calls: list[dict[str, Any]] = []

    def take(found: re.Match[str]) -> str:
        try:
            call: Any = json.loads(found[1])
            name, arguments = str(call["name"]), call.get("arguments", {})
            given = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return found[0]
        if encodable(name + given) != name + given:  # half a surrogate pair, which no answer can carry
            return found[0]
        function = {"name": name, "arguments": given}
        calls.append({"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function})
        return ""

    rest = _CALL.sub(take, text)
    return (rest.strip() if calls else rest), calls


def for_template(message: dict[str, Any]) -> dict[str, Any]:
    """A client's message as templates read it: text parts joined, arguments of calls as objects.

    Raises:
        ValueError: it has parts that are no text, or is no message.
    """
    if not isinstance(message.get("role"), str):
        raise ValueError("role: each message has to say whose it is, such as 'user'")
    message = {**message, "content": _text_of(message.get("content"))}
    calls: Any = message.get("tool_calls") or []
    if not isinstance(calls, list) or not all(_is_call(call) for call in cast("list[Any]", calls)):
        raise ValueError("tool_calls: expected a list of calls, each with a function")
    if calls:
        message["tool_calls"] = [_call_for_template(call) for call in cast("list[dict[str, Any]]", calls)]
    return message


def _text_of(content: Any) -> str:
    """Of a message's content: a text, its parts, or nothing where it only calls tools."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise ValueError(f"content: expected a text, or parts of it; got {type(content).__name__}")
    parts = cast("list[Any]", content)
    if any(not isinstance(part, dict) or part.get("type") != "text" for part in parts):
        raise ValueError("content: this model reads text alone; got a part of another type")
    texts = [part.get("text", "") for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("content: a part of type 'text' has no text")
    return "".join(texts)


def _is_call(call: Any) -> bool:
    return isinstance(call, dict) and isinstance(call.get("function"), dict)


def _call_for_template(call: dict[str, Any]) -> dict[str, Any]:
    function: dict[str, Any] = dict(call["function"])
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        with suppress(ValueError, RecursionError):  # else they are the model's own words
            function["arguments"] = json.loads(arguments)
    return {**call, "function": function}


def characters(value: Any) -> int:
    """Of all texts in it, those of keys left out."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(characters, cast("dict[str, Any]", value).values()))
    return sum(map(characters, cast("list[Any]", value))) if isinstance(value, list | tuple) else 0
