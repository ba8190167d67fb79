"""Real signals to this process: the first asks, the second stops, and the old handlers come back."""

from __future__ import annotations

import logging
import os
import shlex
import signal
import threading
from pathlib import Path

import pytest

from groupwise.interrupt import StopRequest, catch_interrupts, interrupted


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_asks_and_the_second_stops_at_once(number: signal.Signals, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="groupwise"), catch_interrupts() as stop:
        assert not stop
        os.kill(os.getpid(), number)
        assert stop
        assert "once more stops at once" in caplog.text
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)


def test_a_signal_of_either_kind_counts() -> None:
    with catch_interrupts() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_handlers_come_back_also_after_an_error() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    def fail() -> None:
        with catch_interrupts():
            assert signal.getsignal(signal.SIGINT) is not before[0]
            raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        fail()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_each_run_starts_unasked() -> None:
    with catch_interrupts() as first:
        os.kill(os.getpid(), signal.SIGINT)
    with catch_interrupts() as second:
        assert first
        assert not second


def test_outside_the_main_thread_nothing_is_caught() -> None:
    found: list[StopRequest] = []
    before = signal.getsignal(signal.SIGINT)

    def work() -> None:
        with catch_interrupts() as stop:
            assert signal.getsignal(signal.SIGINT) is before
            found.append(stop)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert len(found) == 1
    assert not found[0]


def test_the_command_to_go_on_with_can_be_pasted() -> None:
    said = interrupted(Path("my runs/one"), 3)
    assert shlex.split(said.split("`")[1]) == ["groupwise", "eval", "my runs/one@3"]
