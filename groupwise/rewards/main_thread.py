"""Which code needs a main thread, and how that is found out.

`signal` works in a main thread alone (Math-Verify guards itself with SIGALRM); objects of sqlite3, event loops,
thread-locals and greenlets belong to the thread that made them, which is the one that imported the user's file.
"""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

_BOUND_TO_MAIN = re.compile(
    r"main[ -]thread"  # signal, set_wakeup_fd, Tcl
    r"|in (?:a|that same|the same|another|a different) thread"  # sqlite3
    r"|(?:same|different|another|other) thread"  # greenlet, PyO3
    r"|no current event loop"
    r"|threaded environment"  # Math-Verify
    r"|'_thread\._local' object has no attribute"
    r"|is unsendable"  # PyO3
    r"|child watcher",
    re.IGNORECASE,
)
_BOUND_TO_TRAINER = re.compile(r"Cannot re-initialize CUDA in forked subprocess|cannot be sent to the reward's process")
_LONGEST_MESSAGE = 2000
_LONGEST_CHAIN = 8


def is_bound_to_main(error: BaseException) -> bool:
    """Whether the error, or one that it came from, says that the code runs in a main thread alone."""
    return any(_BOUND_TO_MAIN.search(text) for text in _messages(error))


def is_bound_to_trainer(error: BaseException) -> bool:
    """Whether it says that the code runs in no process but the trainer's."""
    return any(_BOUND_TO_TRAINER.search(text) for text in _messages(error))


def _messages(error: BaseException) -> Iterator[str]:
    link: BaseException | None = error
    for _ in range(_LONGEST_CHAIN):
        if link is None:
            return
        try:
            yield str(link)[:_LONGEST_MESSAGE]
        except BaseException:  # noqa: BLE001 - an exception's own __str__ is the user's code too
            return
        link = link.__cause__ or link.__context__


@dataclass(slots=True)
class Watch:
    """What one call asked for."""

    wants_main: bool = False


_watch: ContextVar[Watch | None] = ContextVar("groupwise_reward_watch", default=None)
_lock = threading.Lock()
_watched = 0
_original: Callable[..., Any] = signal.signal


def _noticing(*given: Any) -> Any:
    """`signal.signal`, which also notes that it refused because this is no main thread."""
    try:
        return _original(*given)
    except ValueError:
        watch = _watch.get()
        if watch is not None and threading.current_thread() is not threading.main_thread():
            watch.wants_main = True
        raise


@contextmanager
def watching(watch: Watch) -> Iterator[None]:
    """Within it, a call in this context that wants a signal handler is noticed.

    The error alone does not tell: rewards often catch whatever their parser raises, and score 0 for it.
    """
    global _watched, _original
    with _lock:
        if not _watched:
            _original = signal.signal
            signal.signal = _noticing
        _watched += 1
    token = _watch.set(watch)
    try:
        yield
    finally:
        _watch.reset(token)
        with _lock:
            _watched -= 1
            if not _watched and signal.signal is _noticing:
                signal.signal = _original  # pyright: ignore[reportAttributeAccessIssue]
