"""Rewards in the main thread of a process of their own: for code that needs one, and for code that cannot be stopped.

A function that has a name (a file or a module, and the function in it) is loaded anew in a fresh process. One that was
given as an object cannot be sent anywhere, so this process forks: the copy holds the function, with all that it refers
to, and its only thread is a copy of the one that forked, now the main one.

A call that outlives its timeout is killed, with everything that it started; so is the process when the run ends, or is
killed itself. Arguments go there as a pickle, which only the own child reads, and answers come back as JSON.
"""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import signal
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe
from typing import Any, cast

from groupwise.errors import ConfigError, DataError
from groupwise.rewards.calls import Arguments, Failed, Outcome, RewardCall
from groupwise.rewards.isolation import Turns, started_future, within
from groupwise.rewards.values import Graded
from groupwise.rewards.worker import READY, run_forked

START_SECONDS = 300.0
_PATIENCE_SECONDS = 2.0
_GLANCE_SECONDS = 0.005
_RAISED = {"ConfigError": ConfigError, "DataError": DataError}
_children: weakref.WeakSet[Child]


def can_have_process() -> bool:
    """Whether this system can give a reward a process of its own."""
    return hasattr(os, "fork") and hasattr(os, "posix_spawn")


class Child:
    """A process that is there for one reward, seen from its parent."""

    def __init__(self, pid: int, connection: Connection) -> None:
        self.pid, self.connection = pid, connection
        self.is_ready = False
        self._parent = threading.current_thread()
        self._status: int | None = None
        self._lock = threading.Lock()
        _children.add(self)

    def is_of(self, thread: threading.Thread) -> bool:
        """Whether this thread started it: the child ends with that one, as Linux has it."""
        return self._parent is thread

    def has_ended(self) -> bool:
        with self._lock:
            if self._status is None:
                self._reap(os.WNOHANG)
            return self._status is not None

    def end(self, *, patience: float = 0.0) -> str:
        """Kill it, and what it started; how it ended, in words.

        Args:
            patience: seconds for an end of its own, which its closed pipe shows a moment before the system does.
        """
        deadline = time.monotonic() + patience
        while not self.has_ended() and time.monotonic() < deadline:
            time.sleep(_GLANCE_SECONDS)
        with self._lock:
            if not self.connection.closed:
                with suppress(ProcessLookupError, PermissionError):  # it leads a group, which may outlive it
                    os.killpg(self.pid, signal.SIGKILL)
                if self._status is None:
                    with suppress(ProcessLookupError):  # it may not be so far yet
                        os.kill(self.pid, signal.SIGKILL)
                    self._reap(0)
                self.connection.close()
            return _in_words(self._status)

    def _reap(self, options: int) -> None:
        try:
            pid, status = os.waitpid(self.pid, options)
        except ChildProcessError:  # somebody else waits for all children of this process
            pid, status = self.pid, 0
        if pid:
            self._status = status


_children = weakref.WeakSet()


class ProcessRunner:
    """Calls a reward in a process of its own, one call at a time; the process stays for the next one."""

    def __init__(self, call: RewardCall) -> None:
        self._call = call
        self._turns = Turns()
        self._child: Child | None = None
        self._last_words: Callable[[], object] | None = None

    async def run(self, arguments: Arguments, size: int) -> Outcome:
        async with self._turns.next():
            try:
                request = _request(arguments(), self._call, size)
            except Exception as error:  # noqa: BLE001 - an object's own pickling is anybody's code
                return Outcome(_cannot_send(error), 0.0, "trainer")
            if failed := await self._start():
                return Outcome(failed, 0.0)
            started = time.perf_counter()
            result = await self._within(self._call.timeout, lambda child: _exchange(child, request, self._call))
            needs = result.needs if isinstance(result, Failed) else ""
            return Outcome(result, time.perf_counter() - started, needs)

    def abandoned(self) -> int:
        return 0

    def close(self) -> None:
        if self._last_words is not None:
            self._last_words()
        self._child = self._last_words = None

    async def _start(self) -> Failed | None:
        """Make sure that there is a process which waits for a call."""
        child = self._child
        if child is not None and (child.has_ended() or not child.is_of(threading.current_thread())):
            self.close()
        if self._child is None:
            self._child = start_child(self._call)
            self._last_words = weakref.finalize(self, self._child.end)
        if self._child.is_ready:
            return None
        came = await self._within(START_SECONDS, _await_ready)
        return came if isinstance(came, Failed) else None

    async def _within(self, timeout: float, work: Callable[[Child], Graded | Failed]) -> Graded | Failed:
        child, future = self._child, started_future()
        assert child is not None, "a call needs a process"
        thread = threading.Thread(
            target=_resolve, args=(future, work, child), name=f"reward-{self._call.name}", daemon=True
        )
        thread.start()
        try:
            return await within(timeout, future, ending="its process was ended")
        finally:
            if not future.done() or child.connection.closed:
                await asyncio.get_running_loop().run_in_executor(None, self.close)


def start_child(call: RewardCall) -> Child:
    """Start the process of a reward."""
    ours, theirs = cast("tuple[Connection, Connection]", Pipe())
    named = call.config is not None and not call.config.name.startswith("__main__:") and sys.executable
    try:
        pid = _spawn(theirs, call) if named else _fork(ours, theirs, call)
    finally:
        theirs.close()
    child = Child(pid, ours)
    if named:
        with suppress(OSError):  # it has ended; whoever waits for it to be ready finds out
            ours.send_bytes(pickle.dumps((os.getpid(), call.config, call.timeout)))
    return child


def _spawn(theirs: Connection, call: RewardCall) -> int:
    path = [entry for entry in sys.path if isinstance(entry, str)]
    program = f"import sys; sys.path[:] = {path!r}; from groupwise.rewards.worker import main; main()"
    actions = [(os.POSIX_SPAWN_DUP2, theirs.fileno(), 0)]
    return os.posix_spawn(sys.executable, [sys.executable, "-c", program], os.environ, file_actions=actions)


def _fork(ours: Connection, theirs: Connection, call: RewardCall) -> int:
    for stream in (sys.stdout, sys.stderr):  # what waits in them would be written twice
        with suppress(Exception):
            stream.flush()
    parent, others = os.getpid(), [child.connection for child in _children]
    with warnings.catch_warnings():
        # Other threads are not in the copy, nor is anything that needs them: the worker sees to that.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        run_forked(theirs, call, parent=parent, foreign=[ours, *others])
    return pid


def _request(arguments: dict[str, Any], call: RewardCall, size: int) -> bytes:
    """What is sent for one call. Of the trainer's own objects, those that hold data go along as they are now."""
    state = {name: value for name, value in call.extras.items() if not callable(value)}
    return pickle.dumps((arguments, state, size), protocol=pickle.HIGHEST_PROTOCOL)


def _cannot_send(error: Exception) -> Failed:
    kind = type(error).__name__
    return Failed(kind, f"the row's columns cannot be sent to the reward's process: {kind}: {str(error)[:200]}")


def _await_ready(child: Child) -> Graded | Failed:
    try:
        first = child.connection.recv_bytes()
    except (EOFError, OSError):
        return Failed("crash", f"its process {child.end(patience=_PATIENCE_SECONDS)} before it was ready")
    if first != READY:
        child.end()
        return _failure(json.loads(first))
    child.is_ready = True
    return Graded((), ())


def _exchange(child: Child, request: bytes, call: RewardCall) -> Graded | Failed:
    try:
        child.connection.send_bytes(request)
        answer = json.loads(child.connection.recv_bytes())
    except (EOFError, OSError, ValueError):
        return Failed("crash", f"its process {child.end(patience=_PATIENCE_SECONDS)} during the call")
    for name, positional, named in answer["reports"]:
        call.extras[name](*positional, **named)
    if "values" in answer:
        return Graded(tuple(answer["values"]), tuple(answer["problems"]))
    return _failure(answer)


def _failure(answer: dict[str, Any]) -> Failed:
    """What is wrong, as the other side says it.

    Raises:
        ConfigError, DataError, KeyboardInterrupt: it was raised there.
    """
    if answer["kind"] == "KeyboardInterrupt":
        raise KeyboardInterrupt
    if answer["kind"] in _RAISED and answer["raised"]:
        raise _RAISED[answer["kind"]](answer["message"])
    return Failed(answer["kind"], answer["message"], answer["trace"], answer["needs"])


def _resolve(future: Future[Graded | Failed], work: Callable[[Child], Graded | Failed], child: Child) -> None:
    try:
        future.set_result(work(child))
    except BaseException as error:  # noqa: BLE001 - whoever waits for the call raises it
        future.set_exception(error)


def _in_words(status: int | None) -> str:
    if status is None or os.WIFEXITED(status):
        return f"ended with exit code {os.waitstatus_to_exitcode(status or 0)}"
    number = os.WTERMSIG(status)
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = str(number)
    return f"was ended by signal {name}"
