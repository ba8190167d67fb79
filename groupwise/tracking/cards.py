"""Samples on a terminal: a card for each, prompt and answer as text, wrapped, the answer whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from groupwise.texts import one_line, printable
from groupwise.tracking.base import LONGEST_TEXT, Sample

LONGEST_PROMPT = 400  # characters
_INDENT = "  "


def cards(step: int, samples: Sequence[Sample], console: Console) -> Iterator[Text]:
    """The lines of these samples, each within the console's width. A prompt is said once for neighbours that share it.

    Nothing in a text is markup or acts on a terminal. Of a long prompt, and of an answer beyond `LONGEST_TEXT`, the
    middle is left out, so that what decides stays: the question, and how the answer ends.
    """
    prompt = None
    yield from _wrapped(Text(f"samples of step {step}", "bold"), console)
    for number, sample in enumerate(samples, start=1):
        yield Text()
        yield from _title(number, len(samples), sample, console.width)
        if sample.prompt != prompt:
            prompt = sample.prompt
            yield Text("prompt")
            yield from _block(prompt, console, limit=LONGEST_PROMPT)
        yield Text("answer")
        yield from _block(sample.completion, console, limit=LONGEST_TEXT)


def _title(number: int, count: int, sample: Sample, width: int) -> Iterator[Text]:
    """Which sample it is and its numbers, each with its name; as many to a line as fit."""
    shown = [f"{one_line(name, limit=30)} {_number(value)}" for name, value in sample.rewards.items()]
    parts = [f"reward {_number(sample.reward)}", *(shown if len(shown) > 1 else [])]
    line = f"{number} of {count}"
    for part in (*parts, f"advantage {sample.advantage:+.3g}"):
        if cell_len(f"{line}  {part}") > width:
            yield Text(line, "bold")
            line = f"{_INDENT}{part}"
        else:
            line = f"{line}  {part}"
    yield Text(line, "bold")


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.3g}"


def _block(text: str, console: Console, *, limit: int) -> Iterator[Text]:
    clean = Text(printable(without_middle(text, limit=limit)).rstrip("\n") or "(no text)")
    for line in clean.wrap(console, max(console.width - len(_INDENT), 10), tab_size=4, overflow="fold"):
        line.rstrip()
        yield Text(_INDENT).append_text(line) if line.plain else Text()


def _wrapped(text: Text, console: Console) -> Iterator[Text]:
    yield from text.wrap(console, console.width, overflow="fold")


def without_middle(text: str, *, limit: int) -> str:
    """The text, or where it is longer its two ends and how much is between them.

    Example:
        >>> without_middle("a" * 10 + "b" * 10, limit=6)
        'aaa … (14 characters left out) … bbb'
    """
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]} … ({len(text) - 2 * half:,} characters left out) … {text[-half:]}"
