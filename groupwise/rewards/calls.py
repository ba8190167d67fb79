"""One call of a reward: what it needs, what came of it, and how a failure is told.

A boundary module: an exception of the user's is user text too, so nothing about it is trusted: not its message, not
the name of its class, not its size.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias

from groupwise.config.reward import RewardConfig
from groupwise.rewards.main_thread import is_bound_to_main, is_bound_to_trainer
from groupwise.rewards.values import BadReturn, Graded
from groupwise.texts import one_line

MESSAGE_LIMIT = 500
TRACE_LIMIT = 20_000
_NAME_LIMIT = 80

Arguments: TypeAlias = Callable[[], dict[str, Any]]
"""Makes the keyword arguments of one call, new ones each time: a repeated call must not see what was changed."""

Place: TypeAlias = Literal["", "main thread", "trainer"]


@dataclass(frozen=True, slots=True)
class Failed:
    """A call that gave no answer.

    Attributes:
        kind: the exception's type, `timeout`, or `crash`.
        message: what happened and where.
        trace: the traceback, or "".
        needs: where the function could have run: the main thread of any process, or the trainer's own; "" when that
            would not have helped.

    Example:
        Failed(kind="KeyError", message="KeyError: 'answer' (at my_rewards.py:12)", trace="Traceback …")
    """

    kind: str
    message: str
    trace: str = ""
    needs: Place = ""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one call.

    Attributes:
        seconds: how long it took, waiting for its turn not counted.
        needs: as in `Failed`; also where the function hid that it failed.

    Example:
        Outcome(result=Graded(values=(0.0,), problems=("",)), seconds=0.1, needs="main thread")
    """

    result: Graded | Failed
    seconds: float
    needs: Place = ""


@dataclass(frozen=True, slots=True)
class RewardCall:
    """One reward, ready to be called.

    Attributes:
        function: the user's function, sync or async.
        name: for messages and the names of threads.
        file: the user's file, whose line an error message shows.
        timeout: seconds.
        is_async: calling it gives something to await.
        config: names the function, so that another process can load it; None for one given as an object.
        extras: keyword arguments of each call that are the trainer's own, given as they are and never copied.

    Example:
        RewardCall(says_please, name="says_please", file="my_rewards.py", timeout=60.0)
    """

    function: Callable[..., Any]
    name: str
    file: str
    timeout: float
    is_async: bool = False
    config: RewardConfig | None = None
    extras: Mapping[str, Any] = field(default_factory=dict)


class Runner(Protocol):
    """Calls one reward in isolation."""

    async def run(self, arguments: Arguments, size: int) -> Outcome:
        """Call the reward for a group of `size` completions."""
        ...

    def abandoned(self) -> int:
        """Threads that hang in an abandoned call now."""
        ...

    def close(self) -> None:
        """End what it started. A later call starts it anew."""
        ...


def describe(error: BaseException, file: str) -> Failed:
    """Say what was raised and where in the user's code: the innermost line in `file`, else the innermost line."""
    if isinstance(error, BadReturn):
        return Failed(type(error).__name__, str(error))
    kind = one_line(type.__dict__["__name__"].__get__(type(error)), limit=_NAME_LIMIT)
    try:
        text, trace = str(error), "".join(traceback.format_exception(error))
    except BaseException:  # noqa: BLE001 - an exception's own __str__ is the user's code too, and may even exit
        text, trace = "(its message cannot be shown)", ""
    text = text if len(text) <= MESSAGE_LIMIT else text[:MESSAGE_LIMIT] + "…"
    message = f"{kind}: {text}{_place(error, file)}" if text else f"{kind}{_place(error, file)}"
    needs: Place = "trainer" if is_bound_to_trainer(error) else "main thread" if is_bound_to_main(error) else ""
    return Failed(kind, message, shortened(trace), needs)


def shortened(trace: str) -> str:
    """The beginning and the end of a long traceback."""
    half = TRACE_LIMIT // 2
    return trace if len(trace) <= TRACE_LIMIT else f"{trace[:half]}\n… ({len(trace):,} characters) …\n{trace[-half:]}"


def _place(error: BaseException, file: str) -> str:
    here = (__file__, *_OWN_FILES)
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename not in here]
    own = [frame for frame in frames if file and frame.filename == file] or frames
    return f" (at {own[-1].filename}:{own[-1].lineno})" if own else ""


_OWN_FILES = tuple(
    __file__.replace("calls.py", f"{name}.py") for name in ("isolation", "worker", "placement", "values")
)
