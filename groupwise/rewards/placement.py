"""Where a reward runs (`reward.N.isolated`): a thread, a process of its own, or the trainer's own thread."""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
import signal
import time
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

from groupwise.errors import ConfigError
from groupwise.process_state import guarded
from groupwise.rewards.calls import Arguments, Failed, Outcome, RewardCall, Runner
from groupwise.rewards.isolation import LoopRunner, ThreadRunner, settle
from groupwise.rewards.process import ProcessRunner, can_have_process
from groupwise.rewards.values import Graded, grade

Isolated: TypeAlias = bool | Literal["auto", "main"]

_log = logging.getLogger("groupwise.rewards")


def make_runner(call: RewardCall, isolated: Isolated) -> Runner:
    """The runner of a reward.

    Raises:
        ConfigError: it is to have a process of its own, and this system has none to give.
    """
    if isolated == "main":
        return TrainerRunner(call)
    if isolated == "auto":
        return AutoRunner(call)
    if not isolated:
        return _thread(call)
    if not can_have_process():
        raise ConfigError(
            f"reward {call.name!r}: isolated = true needs fork and posix_spawn, which this system does not have; set "
            'it to "main"'
        )
    return ProcessRunner(call)


class AutoRunner:
    """Begins in a thread, and moves to where the function can run once a call turns out to need it.

    The call that showed it is made again there.
    """

    def __init__(self, call: RewardCall) -> None:
        self._call = call
        self._places: list[Runner] = [_thread(call)]
        if _has_alarm_of_its_own(call.function):
            self._move(self._places[0], "main thread", "its module handles SIGALRM")

    async def run(self, arguments: Arguments, size: int) -> Outcome:
        while True:
            runner = self._places[-1]
            outcome = await runner.run(arguments, size)
            if not outcome.needs or not self._move(runner, outcome.needs, _reason(outcome.result)):
                return outcome

    def abandoned(self) -> int:
        return sum(place.abandoned() for place in self._places)

    def close(self) -> None:
        for place in self._places:
            place.close()

    def _move(self, tried: Runner, needs: str, reason: str) -> bool:
        """Find a better place than the one that was tried; whether there is one."""
        if tried is not self._places[-1]:
            return True  # another call moved meanwhile
        if isinstance(tried, TrainerRunner) or (isinstance(tried, ProcessRunner) and needs != "trainer"):
            return False
        if needs == "main thread" and can_have_process():
            self._places.append(ProcessRunner(self._call))
            _log.warning(
                "reward %r needs a main thread (%s): it runs in that of a process of its own from here on, one call at "
                "a time, and no sample was lost. What it changes in memory stays in that process. Where it is named in "
                "the config, reward.N.isolated = true does so from the start",
                self._call.name,
                reason,
            )
        else:
            self._places.append(TrainerRunner(self._call))
            _log.warning(
                "reward %r needs the trainer's own main thread (%s): it runs there from here on, where nothing can end "
                "a call that hangs, and no sample was lost",
                self._call.name,
                reason,
            )
        return True


class TrainerRunner:
    """Calls a reward in the thread that trains, as TRL does. All else waits for it, and no deadline can end it."""

    def __init__(self, call: RewardCall) -> None:
        self._call = call

    async def run(self, arguments: Arguments, size: int) -> Outcome:
        call, loop, started = self._call, asyncio.get_running_loop(), time.perf_counter()
        result: Graded | Failed
        try:
            with guarded(f"reward {call.name!r}", this_thread=True):
                asyncio._set_running_loop(None)  # so that the function may run a loop of its own
                try:
                    returned = call.function(**arguments(), **call.extras)
                finally:
                    asyncio._set_running_loop(loop)
                if inspect.isawaitable(returned) and call.is_async:
                    async with asyncio.timeout(call.timeout):
                        returned = await returned
            result = grade(returned, size)
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            result = settle(error, call.file)
        except BaseException as error:  # noqa: BLE001 - `settle` raises what must not be kept
            result = settle(error, call.file)
        return Outcome(result, time.perf_counter() - started)

    def abandoned(self) -> int:
        return 0

    def close(self) -> None: ...


def _thread(call: RewardCall) -> Runner:
    return LoopRunner(call) if call.is_async else ThreadRunner(call)


def _reason(result: Graded | Failed) -> str:
    return result.message if isinstance(result, Failed) else "it sets a signal handler, and hides that this failed"


def _has_alarm_of_its_own(function: Callable[..., Any]) -> bool:
    """Whether the function's module set a handler of SIGALRM: an alarm that it sets would go off in the trainer."""
    while isinstance(function, functools.partial):
        function = function.func
    handler = signal.getsignal(signal.SIGALRM) if hasattr(signal, "SIGALRM") else None
    return callable(handler) and inspect.getmodule(handler) is inspect.getmodule(function) is not None
