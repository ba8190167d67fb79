"""Texts that come from anywhere (models, data, exceptions), made fit for where they are written.

Such a text may hold half a surrogate pair, which no UTF-8 file takes; NUL and escape sequences, which act on a
terminal; or ten megabytes. It stays as it is inside the program, and is cleaned once, where it leaves it: `encodable`
for files, `printable` for terminals and logs.
"""

from __future__ import annotations

import re

# Everything that a terminal acts on, and marks that turn the direction of the line they stand in. Not \n and \t.
_ACTS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def encodable(text: str) -> str:
    r"""The text with lone surrogates written out, as in `\udcff`: what every UTF-8 file and strict JSON reader takes.

    Example:
        encodable("answer-\udcff.txt") == r"answer-\udcff.txt"
    """
    if text.isascii():
        return text
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def printable(text: str, *, limit: int | None = None) -> str:
    r"""The text with nothing in it that a terminal acts on: control characters are written out, as in `\x1b`.

    Line breaks and tabs stay.

    Args:
        limit: most characters; a longer text is cut, and says how long it was.

    Example:
        printable("\x1b[2Jgone") == r"\x1b[2Jgone"
    """
    cut = text if limit is None or len(text) <= limit else f"{text[:limit]}… ({len(text):,} characters)"
    return _ACTS.sub(_written_out, encodable(cut))


def one_line(text: str, *, limit: int = 200) -> str:
    r"""The text on one line, for a message that quotes it: as `printable`, with line breaks and tabs written out."""
    return printable(text, limit=limit).replace("\n", r"\n").replace("\t", r"\t")


def first_line(error: BaseException) -> str:
    """What an error says on its first line that is not empty; its kind where it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _written_out(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
