"""One thread that does one thing after another, and never keeps the process alive."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import TypeVar

import torch

T = TypeVar("T")


class Worker:
    """Runs functions in their order, each on as many of torch's threads as its caller has.

    A thread of its own begins with gradients on, without autocast and inference mode, and on the CPU: what the caller
    has set of these is the caller's. `concurrent.futures` has the same thread, and waits for it when the interpreter
    ends, however long that takes.

    Example:
        worker = Worker("policy")
        total = await worker.run(lambda: sum([1, 2]))
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._closed = False

    async def run(self, function: Callable[[], T], *, stopped: threading.Event | None = None) -> T:
        """The function's outcome. The event loop goes on meanwhile.

        Cancelled, it ends when the function has ended, so that nobody meets what the thread is still changing.

        Args:
            stopped: set by a cancellation; the function may look at it, and end sooner.
        """
        outcome = asyncio.wrap_future(self.submit(function))
        try:
            return await asyncio.shield(outcome)
        except BaseException:  # a cancellation, or Ctrl-C, or the function's own
            if stopped is not None:
                stopped.set()
            while not outcome.done():
                with suppress(asyncio.CancelledError):  # cancelled again: the function must end all the same
                    await asyncio.wait([outcome])
            if not outcome.cancelled():
                outcome.exception()  # nobody else asks, and asyncio would complain
            raise

    def submit(self, function: Callable[[], T]) -> Future[T]:
        """The function's outcome, once it is its turn."""
        assert not self._closed, f"the {self._name} is closed"
        future: Future[T] = Future()
        threads = torch.get_num_threads()  # torch keeps them for each thread: this one would not hear of a change

        def call() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                if torch.get_num_threads() != threads:
                    torch.set_num_threads(threads)
                result = function()
            except BaseException as error:  # noqa: BLE001 - whoever waits for it raises it
                future.set_exception(error)
            else:
                future.set_result(result)

        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name=self._name, daemon=True)
            self._thread.start()
        self._calls.put(call)
        return future

    def close(self) -> None:
        """End the thread once it has done what was submitted. A second call changes nothing."""
        self._closed = True
        if self._thread is not None:
            self._calls.put(None)
            self._thread.join()
            self._thread = None

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            call()
