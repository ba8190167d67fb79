"""One thread that does one thing after another, and never keeps the process alive."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


class Worker:
    """Runs functions in their order. Its thread begins with the first one, and with the caller's number of threads.

    `concurrent.futures` has the same, and waits for its threads when the interpreter ends, however long that takes.

    Example:
        total = Worker("policy").submit(sum, [1, 2]).result()
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def submit(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """The function's outcome, once it is its turn."""
        future: Future[T] = Future()

        def call() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                result = function(*args, **kwargs)
            except BaseException as error:  # noqa: BLE001 - whoever waits for it raises it
                future.set_exception(error)
            else:
                future.set_result(result)

        if self._thread is None:
            threads = torch.get_num_threads()
            self._thread = threading.Thread(target=self._work, args=(threads,), name=self._name, daemon=True)
            self._thread.start()
        self._calls.put(call)
        return future

    def close(self) -> None:
        """End the thread once it has done what was submitted."""
        self._calls.put(None)
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _work(self, threads: Any) -> None:
        torch.set_num_threads(threads)
        while (call := self._calls.get()) is not None:
            call()
