"""The policy's thread: what it has of its caller, and how it ends."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable

import pytest
import torch

from groupwise.interrupt import catch_interrupts
from groupwise.policy.worker import Worker


def until(stopped: threading.Event, ended: list[str]) -> Callable[[], None]:
    """A function that ends a while after it was asked to."""

    def function() -> None:
        assert stopped.wait(20)
        time.sleep(0.2)
        ended.append("function")

    return function


def test_it_has_as_many_threads_as_its_caller_has_now(threads: Callable[[int], None]) -> None:
    worker = Worker("policy")
    found = []
    for number in (2, 1, 3):
        threads(number)
        found.append(asyncio.run(worker.run(torch.get_num_threads)))
    assert found == [2, 1, 3]
    worker.close()


def test_its_state_is_its_own() -> None:
    def state() -> tuple[bool, bool, bool, str]:
        modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")
        return *modes, torch.get_default_device().type

    worker = Worker("policy")
    with torch.inference_mode(), torch.autocast("cpu"), torch.device("meta"):
        assert asyncio.run(worker.run(state)) == (True, False, False, "cpu")
    worker.close()


def test_cancelled_the_loop_goes_on_until_the_function_has_ended() -> None:
    """Also when it is cancelled again while it waits."""
    worker, stopped, ended = Worker("policy"), threading.Event(), list[str]()

    async def go() -> int:
        waiting = asyncio.create_task(worker.run(until(stopped, ended), stopped=stopped))
        await asyncio.sleep(0.05)
        waiting.cancel()
        ticks = 0
        while not waiting.done():
            await asyncio.sleep(0.01)
            ticks += 1
            if ticks == 3:
                waiting.cancel()
        assert waiting.cancelled()
        assert ended == ["function"]
        return ticks

    assert asyncio.run(go()) > 5
    worker.close()


def test_a_second_ctrl_c_waits_for_the_function_alone() -> None:
    worker, stopped, ended = Worker("policy"), threading.Event(), list[str]()

    async def go() -> None:
        try:
            await worker.run(until(stopped, ended), stopped=stopped)
        finally:
            ended.append("caller")

    timers = [threading.Timer(after, os.kill, (os.getpid(), signal.SIGINT)) for after in (0.1, 0.2)]
    with catch_interrupts() as stop:
        for timer in timers:
            timer.start()
        with pytest.raises(KeyboardInterrupt):
            asyncio.run(go())
        assert stop
    assert ended == ["function", "caller"]
    worker.close()
