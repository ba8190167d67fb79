from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from groupwise.texts import encodable, one_line, printable

ANY_TEXT = st.text(alphabet=st.characters(exclude_categories=()))


@given(ANY_TEXT)
def test_what_is_encodable_goes_into_a_file_and_comes_back(text: str) -> None:
    cleaned = encodable(text)
    assert json.loads(json.dumps(cleaned, ensure_ascii=False).encode("utf-8")) == cleaned
    assert encodable(cleaned) == cleaned


@given(st.text())
def test_a_text_that_is_valid_unicode_stays_as_it_is(text: str) -> None:
    assert encodable(text) == text


@given(ANY_TEXT)
def test_nothing_printable_acts_on_a_terminal(text: str) -> None:
    cleaned = printable(text)
    assert all(character in "\n\t" or ord(character) >= 32 for character in cleaned)
    assert "\x7f" not in cleaned
    assert not any(0x80 <= ord(character) < 0xA0 for character in cleaned)


def test_escapes_and_halves_of_surrogates_are_written_out() -> None:
    assert printable("\x1b[2J\x00\udcff\u202e\n\tend") == "\\x1b[2J\\x00\\udcff\\u202e\n\tend"
    assert one_line("two\nlines\t\r") == "two\\nlines\\t\\x0d"


def test_a_long_text_says_how_long_it_was() -> None:
    assert printable("a" * 2_000_000, limit=3) == "aaa… (2,000,000 characters)"
    assert len(one_line("b" * 10_000)) < 240
