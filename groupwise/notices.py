"""Warnings on their way to people: to the terminal once each, and into a run's log.

`attach` is called when groupwise is imported, so a warning reaches standard error in every program. It keeps silent
where the program shows its log records itself: nothing is printed twice. Standard error is looked up at each warning,
because a progress bar stands in for it while it is drawn, and prints above itself.

A boundary module: it looks at what other code did to `logging` and `warnings`.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from groupwise.files import LogFile
from groupwise.texts import one_line, printable

OURS = "groupwise"
PYTHON = "py.warnings"  # where `logging.captureWarnings` sends Python's own, too
MOST_ALIKE = 10  # texts of one kind that are shown: those that differ in a step's number, say
LONGEST_SHOWN, LONGEST_LOGGED = 4_000, 20_000  # characters
_TRACE = "\nTraceback (most recent call last)"  # it, and what follows, is for the log


class LogFormatter(logging.Formatter):
    """A record as it stands in log.txt: nothing in it acts on a terminal, and only its first line is not indented."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record), limit=LONGEST_LOGGED).rstrip().replace("\n", "\n  ")


class TerminalHandler(logging.Handler):
    """Prints warnings to standard error.

    Within `once_each` a text is printed the first time alone, and of texts that one line of code words differently
    each time the first `MOST_ALIKE`. What was left out is counted, and told at the end.
    """

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._counts: dict[str, dict[str, int]] | None = None

    def emit(self, record: logging.LogRecord) -> None:
        try:
            if not _is_shown_by_the_program(record, besides=self):
                message, _, _ = record.getMessage().partition(_TRACE)
                text = f"{record.levelname.lower()}: {printable(message, limit=LONGEST_SHOWN).rstrip()}"
                if self._is_news(str(vars(record).get("kind", record.msg)), text):
                    _print(text)
        except Exception:  # noqa: BLE001 - arguments that are no text: no reason to end a run
            self.handleError(record)

    def begin(self) -> bool:
        """Count from now on; False when it does already."""
        self.acquire()
        try:
            news = self._counts is None
            self._counts = {} if self._counts is None else self._counts
        finally:
            self.release()
        return news

    def end(self) -> None:
        """Tell what was not shown, and count no longer."""
        self.acquire()
        try:
            counts, self._counts = self._counts or {}, None
        finally:
            self.release()
        for texts in counts.values():
            for text, times in texts.items():
                if not text:
                    _print(f"(… {times:,} more of the kind: {one_line(next(iter(texts)), limit=80)})")
                elif times > 1:
                    _print(f"(… {times - 1:,} more time{'s' * (times > 2)}: {one_line(text, limit=80)})")

    def _is_news(self, kind: str, text: str) -> bool:
        if self._counts is None:
            return True
        texts = self._counts.setdefault(kind, {})
        news = text not in texts and len(texts) < MOST_ALIKE
        known = text if text in texts or news else ""  # the empty text stands for all that are not kept
        texts[known] = texts.get(known, 0) + 1
        return news


_terminal = TerminalHandler()


def attach() -> None:
    """Show the warnings of groupwise from now on, in this process."""
    logger = logging.getLogger(OURS)
    if _terminal not in logger.handlers:
        logger.addHandler(_terminal)


@contextmanager
def once_each() -> Iterator[None]:
    """Within it a warning is shown once, and Python's own are shown and logged as ours are. Inside another it does
    nothing more."""
    if not _terminal.begin():
        yield
        return
    python = logging.getLogger(PYTHON)
    before = warnings.showwarning
    python.addHandler(_terminal)
    # A program that collects warnings, as a test does, goes on collecting them.
    if _shows_as_python_does():
        warnings.showwarning = _log_python
    try:
        yield
    finally:
        warnings.showwarning = before
        python.removeHandler(_terminal)
        _terminal.end()


@contextmanager
def logged_to(file: Path, level: int = logging.INFO) -> Iterator[None]:
    """Within it, records of groupwise from `level` up, and Python's warnings, are appended to the file."""
    logger, python = logging.getLogger(OURS), logging.getLogger(PYTHON)
    handler = LogFile(file)
    handler.setFormatter(LogFormatter())
    handler.setLevel(level)
    before, shown = logger.level, _terminal.level
    _terminal.setLevel(max(shown, logger.getEffectiveLevel()))  # what the program silenced stays off its terminal
    for each in (logger, python):
        each.addHandler(handler)
    if logger.getEffectiveLevel() > level:
        logger.setLevel(level)
    try:
        with once_each():
            yield
    finally:
        logger.setLevel(before)
        _terminal.setLevel(shown)
        for each in (logger, python):
            each.removeHandler(handler)
        handler.close()


def _print(text: str) -> None:
    # It may be closed, a pipe that nobody reads, or (for Ctrl-C's notice) in the middle of a write: never worth a run.
    with suppress(OSError, ValueError, RuntimeError):
        if sys.stderr is not None:  # a program without a console has none
            sys.stderr.write(text + "\n")
            sys.stderr.flush()


def _is_shown_by_the_program(record: logging.LogRecord, *, besides: logging.Handler) -> bool:
    """Whether a handler that is not ours takes it to people. Files, and what collects records, do not count."""
    logger: logging.Logger | None = logging.getLogger(record.name)
    while logger is not None:
        if any(h is not besides and h.level <= record.levelno and _shows(h) for h in logger.handlers):
            return True
        logger = logger.parent if logger.propagate else None
    return False


def _shows(handler: logging.Handler) -> bool:
    if isinstance(handler, logging.FileHandler | logging.NullHandler):
        return False
    if isinstance(handler, logging.StreamHandler):
        stream = handler.stream
        return stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__) or bool(
            getattr(stream, "isatty", bool)()
        )
    return True  # such as rich's, or one that hands records on to another logging library


def _shows_as_python_does() -> bool:
    own = (warnings.showwarning, vars(warnings).get("_showwarnmsg_impl", warnings.showwarning))
    return all(getattr(function, "__module__", None) == "warnings" for function in own)


def _log_python(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """In the place of `warnings.showwarning`."""
    text = f"{category.__name__}: {message} ({filename}:{lineno})"
    if file is None:
        logging.getLogger(PYTHON).warning("%s", text, extra={"kind": f"{filename}:{lineno}"})
    else:
        file.write(f"{text}\n")
