"""One call of an environment's method: at most so many seconds, and every failure an `EnvironmentFailed`."""

from __future__ import annotations

import asyncio
import functools
import inspect
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

from groupwise.errors import EpisodeError, GroupwiseError
from groupwise.texts import one_line

MAX_ABANDONED = 32
"""Calls that hang for good before the run ends: each keeps a thread or a task."""

_LONGEST_CAUSE = 300


class EnvironmentFailed(Exception):
    """An environment raised, hung or said something that is no answer; the message is the rollout's cause."""


class Calls:
    """Calls the methods of one kind of environment.

    Args:
        name: how the user calls the environment.
        timeout: seconds of one call.
    """

    def __init__(self, name: str, timeout: float) -> None:
        self.name = name
        self._timeout = timeout
        self._abandoned: set[asyncio.Future[Any]] = set()

    async def call(self, method: Callable[..., Any], *args: Any) -> Any:
        """What the method gives: awaited on this loop if it is asynchronous, else from a thread of its own.

        Raises:
            EnvironmentFailed: it raised, or took too long.
            GroupwiseError: it raised one of Groupwise's own errors, which is the user's to mend.
            EpisodeError: too many calls hang.
        """
        what = f"environment {self.name!r}, {_shown(method)}"
        if inspect.iscoroutinefunction(method):
            future: asyncio.Future[Any] = asyncio.ensure_future(_contained(method(*args)))
        else:
            future = _in_thread(method, args)
        try:
            done, _ = await asyncio.wait({future}, timeout=self._timeout)
        except asyncio.CancelledError:
            future.cancel()
            raise
        if not done:
            self._abandon(future)
            raise EnvironmentFailed(f"{what}: no answer within {self._timeout:g} s")
        try:
            return future.result()
        except (GroupwiseError, KeyboardInterrupt):
            raise
        except BaseException as error:
            shown = one_line(f"{type(error).__name__}: {error}", limit=_LONGEST_CAUSE)
            raise EnvironmentFailed(f"{what}: raised {shown}") from error

    def _abandon(self, future: asyncio.Future[Any]) -> None:
        """Leave it; a task that does not end on being cancelled, and a thread, go on."""
        self._abandoned = {each for each in self._abandoned if not each.done()}
        self._abandoned.add(future)
        future.add_done_callback(_forget_outcome)
        if isinstance(future, asyncio.Task):
            future.cancel()
        if len(self._abandoned) >= MAX_ABANDONED:
            raise EpisodeError(
                f"{len(self._abandoned)} calls of the environment {self.name!r} hang and cannot be ended; make its "
                "methods return in time, or raise environment.timeout if they are only slow"
            )


def _shown(method: Callable[..., Any]) -> str:
    plain = method.func if isinstance(method, functools.partial) else method
    return str(getattr(plain, "__name__", type(plain).__name__))


async def _contained(answer: Awaitable[Any]) -> Any:
    try:
        return await answer
    except SystemExit as error:  # a task that raises it would end the event loop
        raise RuntimeError(f"it called sys.exit({error.code!r})") from error


def _in_thread(method: Callable[..., Any], args: tuple[Any, ...]) -> asyncio.Future[Any]:
    """In a thread that does not keep the process alive, one for each call: one that hangs takes no other's place."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Any] = loop.create_future()

    def deliver(result: Any, error: BaseException | None) -> None:
        if not future.done():
            future.set_result(result) if error is None else future.set_exception(error)

    def run() -> None:
        try:
            outcome: tuple[Any, BaseException | None] = (method(*args), None)
        except BaseException as error:  # noqa: BLE001 - whoever awaits it judges
            exits = isinstance(error, SystemExit | StopIteration)  # neither may be a future's exception
            outcome = (None, RuntimeError(f"it raised {type(error).__name__}") if exits else error)
        with suppress(RuntimeError):  # the loop is closed: nobody waits
            loop.call_soon_threadsafe(deliver, *outcome)

    threading.Thread(target=run, name=f"environment-{_shown(method)}", daemon=True).start()
    return future


def _forget_outcome(future: asyncio.Future[Any]) -> None:
    if not future.cancelled():
        future.exception()
