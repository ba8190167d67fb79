"""Whatever an environment does, an episode ends as data, in time; too many that hang end the run."""

from __future__ import annotations

import asyncio
import functools
import threading
import time
from typing import Any

import pytest

from groupwise.environments import EnvironmentFailed
from groupwise.environments.calls import MAX_ABANDONED, Calls
from groupwise.errors import ConfigError, DataError, EpisodeError


async def hangs() -> None:
    await asyncio.sleep(60)


async def ignores_cancellation() -> None:
    while True:
        try:
            await asyncio.sleep(0.2)
            return
        except asyncio.CancelledError:
            pass


def hangs_in_a_thread() -> None:
    time.sleep(1)


async def raises() -> None:
    raise KeyError("answer")


async def exits() -> None:
    raise SystemExit(3)


def exits_in_a_thread() -> None:
    raise SystemExit(3)


def stops() -> None:
    raise StopIteration


def gives() -> str:
    return threading.current_thread().name


def call(method: Any, timeout: float = 0.05) -> Any:
    return asyncio.run(Calls("mine", timeout).call(method))


@pytest.mark.parametrize("method", [hangs, ignores_cancellation, hangs_in_a_thread])
def test_no_answer_in_time_is_a_failure(method: Any) -> None:
    async def go() -> float:
        started = time.perf_counter()
        with pytest.raises(EnvironmentFailed, match=rf"environment 'mine', {method.__name__}: no answer within 0.05 s"):
            await Calls("mine", 0.05).call(method)
        return time.perf_counter() - started

    assert asyncio.run(go()) < 0.15


@pytest.mark.parametrize(
    ("method", "said"),
    [
        (raises, "raised KeyError: 'answer'"),
        (exits, "sys.exit"),
        (exits_in_a_thread, "SystemExit"),
        (stops, "StopIteration"),
    ],
)
def test_what_it_raises_is_a_failure_with_its_name(method: Any, said: str) -> None:
    with pytest.raises(EnvironmentFailed, match=said):
        call(method, 5)


@pytest.mark.parametrize("error", [ConfigError("set it"), DataError("row 3")])
def test_what_the_user_has_to_mend_passes_through(error: Exception) -> None:
    async def refuses() -> None:
        raise error

    with pytest.raises(type(error), match=str(error)):
        call(refuses)


def test_a_plain_function_has_a_thread_of_its_own() -> None:
    assert call(gives, 5) == "environment-gives"


def test_what_makes_one_has_a_name_too() -> None:
    with pytest.raises(EnvironmentFailed, match="mine', dict: raised TypeError"):
        call(functools.partial(dict, 3), 5)  # pyright: ignore[reportCallIssue]


def test_too_many_that_hang_end_the_run() -> None:
    async def go() -> None:
        calls = Calls("mine", 0.001)
        for _ in range(MAX_ABANDONED - 1):
            with pytest.raises(EnvironmentFailed):
                await calls.call(ignores_cancellation)
        with pytest.raises(EpisodeError, match=rf"{MAX_ABANDONED} calls of the environment 'mine' hang"):
            await calls.call(ignores_cancellation)

    asyncio.run(go())


def test_calls_that_end_after_all_do_not_count() -> None:
    async def go() -> None:
        calls = Calls("mine", 0.001)
        for _ in range(3 * MAX_ABANDONED):
            with pytest.raises(EnvironmentFailed):
                await calls.call(hangs)

    asyncio.run(go())
