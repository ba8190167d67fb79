"""How commands print texts that a model, a data file or an exception wrote."""

from __future__ import annotations

import io
import sys

from groupwise.texts import encodable, printable

LONGEST_ERROR = 20_000  # characters


def say(text: str) -> None:
    """Print it on standard output: on a terminal nothing in it acts, and a pipe or file gets it as it is."""
    print(printable(text) if sys.stdout.isatty() else encodable(text), flush=True)


def tell(text: str) -> None:
    """Print it on standard error, which people read."""
    print(printable(text, limit=LONGEST_ERROR), file=sys.stderr)


def take_any_text() -> None:
    """Write out what the encoding of standard output cannot say, and bytes of standard input that are no text in its
    encoding, instead of failing on them."""
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
