"""Ctrl-C: the first one lets the step end and saves a checkpoint, the second one stops at once."""

from __future__ import annotations

import logging
import shlex
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

logger = logging.getLogger(__name__)


class StopRequest:
    """Whether the user asked the run to end after this step."""

    def __init__(self) -> None:
        self.asked = False

    def __bool__(self) -> bool:
        return self.asked

    def ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        logger.warning("stopping after this step, with a checkpoint; once more stops at once")


def interrupted(run: Path, step: int) -> str:
    """What to say at the end of a run that was asked to stop, and saved a checkpoint."""
    return (
        f"stopped after step {step}; --resume goes on from there, and the model so far is {run}@{step}: "
        f"`groupwise eval {shlex.quote(f'{run}@{step}')}`, and so in chat, generate, export and --model"
    )


@contextmanager
def catch_interrupts() -> Iterator[StopRequest]:
    """Within it, Ctrl-C (and SIGTERM) sets the request. Only the main thread gets signals; elsewhere nothing does."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, request.ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
