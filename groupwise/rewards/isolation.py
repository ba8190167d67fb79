"""Rewards in threads of this process: nothing that they do may end, stall or confuse the run.

A boundary module: it catches everything but what must end the process (`KeyboardInterrupt`) and what the user has to
mend before anything else (`ConfigError`, `DataError`). Threads are daemons, so a call that never returns does not keep
the process alive either.
"""

from __future__ import annotations

import asyncio
import contextvars
import decimal
import inspect
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future

from groupwise.errors import ConfigError, DataError
from groupwise.process_state import guarded
from groupwise.rewards.calls import Arguments, Failed, Outcome, Place, RewardCall, describe
from groupwise.rewards.main_thread import Watch, watching
from groupwise.rewards.values import Graded, grade

_UNBLOCK_SECONDS = 1.0


class ThreadRunner:
    """Calls a sync reward in a thread, one call at a time.

    Each call has a thread of its own: one that hangs blocks no later call. It has the caller's context variables, so
    that what the user's file set where it was loaded (a decimal precision, say) holds in it.
    """

    def __init__(self, call: RewardCall) -> None:
        self._call = call
        self._given_up: list[threading.Thread] = []
        self._turns = Turns()

    async def run(self, arguments: Arguments, size: int) -> Outcome:
        async with self._turns.next():
            future, watch, started = started_future(), Watch(), time.perf_counter()
            thread = threading.Thread(
                target=contextvars.copy_context().run,
                args=(_resolve, future, self._work(arguments, size, watch), self._call.file),
                name=f"reward-{self._call.name}",
                daemon=True,
            )
            try:
                with guarded(f"reward {self._call.name!r}"):
                    thread.start()
                    result = await within(self._call.timeout, future)
                return Outcome(result, time.perf_counter() - started, _needs(result, watch))
            finally:
                if not future.done():
                    self._given_up.append(thread)

    def _work(self, arguments: Arguments, size: int, watch: Watch) -> Callable[[], Graded]:
        def work() -> Graded:
            decimal.setcontext(decimal.getcontext().copy())  # what the call sets is its own
            with watching(watch):
                return grade(self._call.function(**arguments(), **self._call.extras), size)

        return work

    def abandoned(self) -> int:
        self._given_up = [thread for thread in self._given_up if thread.is_alive()]
        return len(self._given_up)

    def close(self) -> None: ...


class LoopRunner:
    """Calls an async reward on an event loop of its own in a thread of its own; calls overlap.

    Were it to run on the caller's loop, one blocking line in it would stop sampling and every other reward.
    """

    def __init__(self, call: RewardCall) -> None:
        self._call = call
        self._given_up: list[threading.Thread] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    async def run(self, arguments: Arguments, size: int) -> Outcome:
        loop, started = self._running_loop(), time.perf_counter()
        future, watch = started_future(), Watch()
        work = _resolve_async(future, self._call, arguments, size=size, watch=watch)
        with guarded(f"reward {self._call.name!r}"):
            task = asyncio.run_coroutine_threadsafe(work, loop)
            try:
                result = await within(self._call.timeout, future)
            finally:
                task.cancel()
        seconds = time.perf_counter() - started
        if not future.done() and not await _responds(loop):
            self._give_up(loop)
        return Outcome(result, seconds, _needs(result, watch))

    def abandoned(self) -> int:
        self._given_up = [thread for thread in self._given_up if thread.is_alive()]
        return len(self._given_up)

    def close(self) -> None: ...

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


class Turns:
    """A lock for each event loop: it belongs to the one that first waits for it, and a scorer may outlive a loop."""

    def __init__(self) -> None:
        self._locks: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Lock] = weakref.WeakKeyDictionary()

    def next(self) -> asyncio.Lock:
        return self._locks.setdefault(asyncio.get_running_loop(), asyncio.Lock())


def started_future() -> Future[Graded | Failed]:
    future: Future[Graded | Failed] = Future()
    future.set_running_or_notify_cancel()
    return future


async def within(
    timeout: float, future: Future[Graded | Failed], *, ending: str = "the call was abandoned"
) -> Graded | Failed:
    """The future's result, or after `timeout` seconds the failure that says so."""
    try:
        async with asyncio.timeout(timeout):
            return await asyncio.wrap_future(future)
    except TimeoutError:
        return Failed("timeout", f"no answer within {timeout:g} s (reward.timeout); {ending}")


def settle(error: BaseException, file: str) -> Failed:
    """What the caller is told of the error; what must not be kept from it is raised.

    Raises:
        KeyboardInterrupt, ConfigError, DataError: it is one.
    """
    if isinstance(error, KeyboardInterrupt | ConfigError | DataError):
        raise error
    return describe(error, file)


def _needs(result: Graded | Failed, watch: Watch) -> Place:
    if isinstance(result, Failed) and result.needs:
        return result.needs
    return "main thread" if watch.wants_main else ""


def _resolve(future: Future[Graded | Failed], work: Callable[[], Graded], file: str) -> None:
    try:
        result = work()
    except BaseException as error:  # noqa: BLE001 - `_settle` hands on what must not be kept
        _settle(future, error, file)
    else:
        future.set_result(result)


async def _resolve_async(
    future: Future[Graded | Failed], call: RewardCall, arguments: Arguments, *, size: int, watch: Watch
) -> None:
    try:
        with watching(watch):
            returned = call.function(**arguments(), **call.extras)
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
    try:
        future.set_result(settle(error, file))
    except (KeyboardInterrupt, ConfigError, DataError) as theirs:
        future.set_exception(theirs)


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
