"""The other side of `process.py`: one reward in the main thread of its process, asked through a pipe.

A boundary module, as `isolation.py` is: whatever the function does is an answer.
"""

from __future__ import annotations

import asyncio
import gc
import inspect
import json
import os
import pickle
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, NoReturn

from groupwise.errors import ConfigError, DataError
from groupwise.rewards.calls import RewardCall, describe
from groupwise.rewards.values import grade

READY = b"ready"
_PR_SET_PDEATHSIG = 1


def main() -> NoReturn:
    """A fresh process: it learns from the pipe that is its standard input which reward it is for."""
    connection = Connection(os.dup(0))
    parent, config, timeout = pickle.loads(connection.recv_bytes())  # noqa: S301 - from the process that started this
    _settle_in(parent)
    try:
        from groupwise.rewards.loading import load_reward

        loaded = load_reward(config)
        file, is_async = loaded.signature.file, loaded.signature.is_async
        call = RewardCall(loaded.function, loaded.name, file, timeout, is_async, config)
    except BaseException as error:  # noqa: BLE001 - the file is the user's code
        _send(connection, _told(error, ""))
    else:
        _serve(connection, call)
    _leave()


def run_forked(connection: Connection, call: RewardCall, *, parent: int, foreign: Sequence[Connection]) -> NoReturn:
    """In a copy of `parent`: never returns into what was copied.

    Args:
        foreign: ends of pipes that are the parent's; while a copy of them is open here, nobody would see it gone.
    """
    try:
        # Garbage of the parent's is not ours to collect: its finalizers close and remove what the parent uses.
        gc.freeze()
        for other in foreign:
            with suppress(OSError):
                other.close()
        asyncio._set_running_loop(None)  # the parent's, which this thread was in the midst of
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number in (signal.SIGTERM, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        _settle_in(parent)
        torch = sys.modules.get("torch")
        if torch is not None:
            torch.set_num_threads(1)  # the threads of its pools are not in the copy, and would be waited for
        _serve(connection, call)
    finally:
        _leave()


def _settle_in(parent: int) -> None:
    """Lead a group of its own, which a terminal's Ctrl-C does not reach, and never outlive the parent."""
    with suppress(OSError):
        os.setsid()
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    if sys.platform == "linux":  # elsewhere it ends when it next reads from the pipe
        import ctypes

        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


def _leave() -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    os._exit(0)


def _serve(connection: Connection, call: RewardCall) -> None:
    loop = asyncio.new_event_loop()
    _send(connection, None)
    while True:
        try:
            request = connection.recv_bytes()
        except (EOFError, OSError):
            return
        if loop.is_closed():
            loop = asyncio.new_event_loop()
        asyncio.set_event_loop(loop)
        _send(connection, _answer(call, request, loop))


def _answer(call: RewardCall, request: bytes, loop: asyncio.AbstractEventLoop) -> dict[str, Any]:
    reports: list[Any] = []
    try:
        arguments, state, size = pickle.loads(request)  # noqa: S301 - from the process that started this one
        senders = {name: _sender(name, reports) for name, value in call.extras.items() if callable(value)}
        returned = call.function(**arguments, **{**call.extras, **state, **senders})
        if inspect.isawaitable(returned) and call.is_async:
            returned = loop.run_until_complete(_awaited(returned))
        graded = grade(returned, size)
        answer: dict[str, Any] = {"values": graded.values, "problems": graded.problems}
    except BaseException as error:  # noqa: BLE001 - the other side decides what becomes of it
        answer = _told(error, call.file)
    return {**answer, "reports": reports}


async def _awaited(returned: Any) -> Any:
    return await returned


def _sender(name: str, reports: list[Any]) -> Callable[..., None]:
    """Stands for a function of the trainer's: the call is made there, with what JSON can carry."""

    def send(*positional: Any, **named: Any) -> None:
        reports.append(json.loads(json.dumps([name, positional, named], default=float)))

    return send


def _told(error: BaseException, file: str) -> dict[str, Any]:
    if isinstance(error, KeyboardInterrupt | ConfigError | DataError):
        kind = next(kind.__name__ for kind in (KeyboardInterrupt, ConfigError, DataError) if isinstance(error, kind))
        return {"kind": kind, "message": str(error), "trace": "", "needs": "", "raised": True, "reports": []}
    failed = describe(error, file)
    return {
        "kind": failed.kind,
        "message": failed.message,
        "trace": failed.trace,
        "needs": failed.needs,
        "raised": False,
        "reports": [],
    }


def _send(connection: Connection, answer: dict[str, Any] | None) -> None:
    with suppress(OSError):  # the parent is gone, and this process follows it
        connection.send_bytes(READY if answer is None else json.dumps(answer).encode())
