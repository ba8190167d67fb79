"""Text as clients of a server get it, and the tools that it calls."""

from __future__ import annotations

from typing import Any

import pytest

from groupwise.serve.text import GrowingText, characters, for_template, tool_calls


def test_text_grows_by_whole_characters_and_never_shows_a_stop() -> None:
    tokens = list("ab日本x<stop>never".encode())

    def decode(ids: Any) -> str:
        return bytes(ids).decode(errors="replace")

    for size in (1, 2, 3, 7):
        text = GrowingText(decode, stops=("<stop>",))
        shown = [text.add(tokens[at : at + size]) for at in range(0, len(tokens), size)]
        assert "".join([*shown, text.end()]) == "ab日本x"
        assert text.stopped
    rest = GrowingText(decode, stops=("<stop>",))
    assert rest.add(list(b"a<st")) == "a"
    assert rest.end() == "<st"


def test_calls_of_tools_are_read_and_other_text_stays() -> None:
    text, calls = tool_calls('so <tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>')
    assert text == "so"
    assert calls[0]["function"] == {"name": "add", "arguments": '{"a": 1}'}
    for other in ("<tool_call>{}</tool_call>", "<tool_call>{no}</tool_call>", "<tool_call>", "plain"):
        assert tool_calls(other) == (other, [])
    with pytest.raises(ValueError, match="another type"):
        for_template({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]})


DEEP = "[" * 20_000


@pytest.mark.parametrize(
    "call",
    [
        DEEP,
        '{"name": "f", "arguments": ' + DEEP + "}",
        r'{"name": "\ud800"}',
        r'{"name": "f", "arguments": {"a": "\udfff"}}',
        r'{"name": "f", "arguments": "\ud800"}',
    ],
    ids=["deep", "deep arguments", "half a name", "half an argument", "half a text"],
)
def test_a_call_that_no_answer_can_carry_stays_the_models_own_words(call: str) -> None:
    text = f"<tool_call>{call}</tool_call>"
    assert tool_calls(text) == (text, [])


def test_arguments_that_are_no_json_are_the_clients_own_words() -> None:
    for words in (DEEP, "a + b", "9" * 5000):
        call = {"function": {"name": "f", "arguments": words}}
        message = for_template({"role": "assistant", "content": None, "tool_calls": [call]})
        assert message["tool_calls"][0]["function"]["arguments"] == words


def test_texts_are_counted_wherever_they_stand() -> None:
    assert characters([{"content": "abc", "calls": [{"arguments": {"a": "de", "b": 7}}]}, ("f", None)]) == 6
