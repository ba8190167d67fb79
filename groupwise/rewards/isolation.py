"""Where code that users wrote is called: nothing it does may end, stall or confuse the run.

A boundary module: it catches everything but what must end the process (`KeyboardInterrupt`) and what the user has to
mend before anything else (`ConfigError`, `DataError`). Threads are daemons, so a call that never returns does not keep
the process alive either.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
import time
import traceback
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

from groupwise.errors import ConfigError, DataError
from groupwise.rewards.values import BadReturn, Graded, grade

_MESSAGE_LIMIT = 500
_UNBLOCK_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Failed:
    """A call that gave no answer.

    Attributes:
        kind: the exception's type, or `timeout`.
        message: what happened and where.
        trace: the traceback, or "".

    Example:
        Failed(kind="KeyError", message="KeyError: 'answer' (at my_rewards.py:12)", trace="Traceback …")
    """

    kind: str
    message: str
    trace: str = ""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one call, and how long it took in seconds, waiting for its turn not counted."""

    result: Graded | Failed
    seconds: float


@dataclass(frozen=True, slots=True)
class RewardCall:
    """One reward, ready to be called.

    Attributes:
        function: the user's function, sync or async.
        name: for thread names.
        file: the user's file, whose line an error message shows.
        timeout: seconds.
    """

    function: Callable[..., Any]
    name: str
    file: str
    timeout: float


class Runner(Protocol):
    """Calls one reward in isolation."""

    async def run(self, arguments: dict[str, Any], size: int) -> Outcome:
        """Call the reward for a group of `size` completions."""
        ...

    def abandoned(self) -> int:
        """Threads that hang in an abandoned call now."""
        ...


class ThreadRunner:
    """Calls a sync reward in a thread, one call at a time.

    Each call has a thread of its own: one that hangs blocks no later call.
    """

    def __init__(self, call: RewardCall) -> None:
        self._call = call
        self._given_up: list[threading.Thread] = []
        self._turns: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Lock] = weakref.WeakKeyDictionary()

    async def run(self, arguments: dict[str, Any], size: int) -> Outcome:
        call = self._call
        # A lock belongs to the event loop that first waits for it, and a scorer may outlive a loop.
        turn = self._turns.setdefault(asyncio.get_running_loop(), asyncio.Lock())
        async with turn:
            future: Future[Graded | Failed] = Future()
            future.set_running_or_notify_cancel()
            thread = threading.Thread(
                target=_resolve,
                args=(future, lambda: grade(call.function(**arguments), size), call.file),
                name=f"reward-{call.name}",
                daemon=True,
            )
            started = time.perf_counter()
            thread.start()
            try:
                return Outcome(await _within(call.timeout, future), time.perf_counter() - started)
            finally:
                if not future.done():
                    self._given_up.append(thread)

    def abandoned(self) -> int:
        self._given_up = [thread for thread in self._given_up if thread.is_alive()]
        return len(self._given_up)


class LoopRunner:
    """Calls an async reward on an event loop of its own in a thread of its own; calls overlap.

    Were it to run on the caller's loop, one blocking line in it would stop sampling and every other reward.
    """

    def __init__(self, call: RewardCall) -> None:
        self._call = call
        self._given_up: list[threading.Thread] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    async def run(self, arguments: dict[str, Any], size: int) -> Outcome:
        loop, started = self._running_loop(), time.perf_counter()
        future: Future[Graded | Failed] = Future()
        future.set_running_or_notify_cancel()
        task = asyncio.run_coroutine_threadsafe(_resolve_async(future, self._call, arguments, size), loop)
        try:
            result = await _within(self._call.timeout, future)
        finally:
            task.cancel()
        seconds = time.perf_counter() - started
        if not future.done() and not await _responds(loop):
            self._give_up(loop)
        return Outcome(result, seconds)

    def abandoned(self) -> int:
        self._given_up = [thread for thread in self._given_up if thread.is_alive()]
        return len(self._given_up)

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        if self._loop is None or self._thread is None or not self._thread.is_alive():
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(
                target=_serve, args=(self._loop,), name=f"reward-{self._call.name}", daemon=True
            )
            self._thread.start()
            weakref.finalize(self, _stop, self._loop)
        return self._loop

    def _give_up(self, loop: asyncio.AbstractEventLoop) -> None:
        if loop is self._loop and self._thread is not None:
            self._given_up.append(self._thread)
            self._loop = self._thread = None
            _stop(loop)


def make_runner(call: RewardCall, *, is_async: bool) -> Runner:
    """The runner for a sync or an async reward."""
    return LoopRunner(call) if is_async else ThreadRunner(call)


def describe(error: BaseException, file: str) -> Failed:
    """Say what was raised and where in the user's code: the innermost line in `file`, else the innermost line."""
    if isinstance(error, BadReturn):
        return Failed(type(error).__name__, str(error))
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    own = [frame for frame in frames if file and frame.filename == file] or frames
    place = f" (at {own[-1].filename}:{own[-1].lineno})" if own else ""
    kind = type(error).__name__
    try:
        text = str(error)
        trace = "".join(traceback.format_exception(error))
    except Exception:  # noqa: BLE001 - an exception's own __str__ is the user's code too
        text, trace = "(its message cannot be shown)", ""
    text = text if len(text) <= _MESSAGE_LIMIT else text[:_MESSAGE_LIMIT] + "…"
    return Failed(kind, f"{kind}: {text}{place}" if text else f"{kind}{place}", trace)


async def _within(timeout: float, future: Future[Graded | Failed]) -> Graded | Failed:
    try:
        async with asyncio.timeout(timeout):
            return await asyncio.wrap_future(future)
    except TimeoutError:
        return Failed("timeout", f"no answer within {timeout:g} s (reward.timeout); the call was abandoned")


def _resolve(future: Future[Graded | Failed], work: Callable[[], Graded], file: str) -> None:
    try:
        result = work()
    except BaseException as error:  # noqa: BLE001 - `_settle` hands on what must not be kept
        _settle(future, error, file)
    else:
        future.set_result(result)


async def _resolve_async(
    future: Future[Graded | Failed], call: RewardCall, arguments: dict[str, Any], size: int
) -> None:
    try:
        returned = call.function(**arguments)
        result = grade(await returned if inspect.isawaitable(returned) else returned, size)
    except BaseException as error:
        task = asyncio.current_task()
        if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
            raise
        # Nothing else may leave this coroutine: an interrupt or exit would end the loop, and its other calls with it.
        _settle(future, error, call.file)
    else:
        future.set_result(result)


def _settle(future: Future[Graded | Failed], error: BaseException, file: str) -> None:
    if isinstance(error, KeyboardInterrupt | ConfigError | DataError):
        future.set_exception(error)
    else:
        future.set_result(describe(error, file))


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
    except SystemExit:  # out of a task that the reward started; the call that waits for it runs into its timeout
        pass
    finally:
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()


def _stop(loop: asyncio.AbstractEventLoop) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(loop.stop)


async def _responds(loop: asyncio.AbstractEventLoop) -> bool:
    """Whether the loop gets round to new work, that is, whether no call blocks it."""
    pong: Future[None] = Future()
    pong.set_running_or_notify_cancel()
    if loop.is_closed():
        return False
    loop.call_soon_threadsafe(pong.set_result, None)
    try:
        async with asyncio.timeout(_UNBLOCK_SECONDS):
            await asyncio.wrap_future(pong)
    except TimeoutError:
        return False
    return True
