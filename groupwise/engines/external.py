"""An engine in other processes, made of a config: which servers, in which dialect, found or started."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from groupwise.config import RolloutConfig
from groupwise.engines.connection import Connection
from groupwise.engines.dialects.base import Dialect, Facts
from groupwise.engines.dialects.lmdeploy import LmDeploy
from groupwise.engines.dialects.openai import OpenAi
from groupwise.engines.dialects.own import Own
from groupwise.engines.dialects.sglang import SgLang
from groupwise.engines.dialects.vllm import Vllm
from groupwise.engines.http import HttpEngine
from groupwise.engines.identity import KEY_VARIABLE
from groupwise.engines.member import Launcher, Member
from groupwise.errors import ConfigError, EngineError, EngineLost

logger = logging.getLogger(__name__)
T = TypeVar("T")

_START_SECONDS = 10.0
_SPARE = 8
"""Requests beside samples: probes, proofs, control."""


@dataclass(frozen=True, slots=True)
class Speaks:
    """What of a model a dialect has to know.

    Attributes:
        adapter: an adapter is trained, and the engine is to have it as one.
        temperature: that samples are learned at.
        exact: what a server of Groupwise's says of itself.
    """

    stop_token_ids: Sequence[int]
    adapter: bool = False
    temperature: float = 1.0
    exact: bool = True


def dialect_of(name: str, speaks: Speaks) -> Dialect:
    """How a server of that name is spoken to."""
    if name == "http":
        return Own(exact=speaks.exact)
    if name == "lmdeploy":
        return LmDeploy(temperature=speaks.temperature)
    if name == "openai":
        return OpenAi()
    kind = Vllm if name == "vllm" else SgLang
    return kind(kind="adapter" if speaks.adapter else "model", stop_token_ids=speaks.stop_token_ids)


def reach(config: RolloutConfig, *, trains: bool = True) -> list[Facts]:
    """What the servers at `rollout.urls` say of themselves; nothing where none is given.

    Raises:
        ConfigError: one does not answer, is of another kind, or cannot be trained over.
    """
    found = _in_a_loop(_reach(config)) if config.urls else []
    if trains and (problems := [facts.problem for facts in found if facts.problem]):
        raise ConfigError(f"rollout.urls: {problems[0]}")
    return found


async def _reach(config: RolloutConfig) -> list[Facts]:
    dialect = dialect_of(config.engine, Speaks(()))
    return [await _reached(dialect, url) for url in config.urls]


async def _reached(dialect: Dialect, url: str) -> Facts:
    server = _connection(dialect, url, most=1)
    deadline = time.monotonic() + _START_SECONDS
    try:
        while True:
            try:
                return await dialect.reach(server)
            except EngineLost as error:
                if time.monotonic() > deadline:
                    raise ConfigError(
                        f"rollout.urls: no engine answers there ({error}); start one (docs/engines.md), or correct the "
                        "address"
                    ) from error
            except EngineError as error:
                raise ConfigError(f"rollout.urls: {error}") from error
            await asyncio.sleep(0.2)
    finally:
        await server.close()


def external_engine(
    config: RolloutConfig,
    speaks: Speaks,
    *,
    decode: Callable[[Sequence[int]], str],
    encode: Callable[[str], Sequence[int]],
    vocabulary: int,
    launchers: Sequence[tuple[str, Launcher]] = (),
) -> HttpEngine:
    """The engine; a server that is to be started is started with the first weights.

    Args:
        decode: token ids to text, special tokens left out.
        encode: and back, for a server that gives text alone.
        vocabulary: tokens from 0 up to this are the model's.
        launchers: the address of each server that is started, and what starts it.
    """
    dialect = dialect_of(config.engine, speaks)
    servers: list[tuple[str, Launcher | None]] = [(url, None) for url in config.urls]
    servers += launchers
    members = [
        Member(
            dialect,
            _connection(dialect, url, most=config.max_concurrent_samples),
            launcher=launcher,
            patience=config.engine_timeout,
        )
        for url, launcher in servers
    ]
    return HttpEngine(
        caps=dialect.caps,
        members=members,
        takes=dialect.takes,
        decode=decode,
        encode=encode,
        vocabulary=vocabulary,
        stop_token_ids=frozenset(speaks.stop_token_ids),
        cuts=not dialect.stops,
        most=config.max_concurrent_samples * len(members),
    )


def _connection(dialect: Dialect, url: str, *, most: int) -> Connection:
    key = os.environ.get(KEY_VARIABLE)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return Connection(url, most=most + _SPARE, health=dialect.health, headers=headers)


def _in_a_loop(work: Coroutine[Any, Any, T]) -> T:
    """Run it to its end, also where an event loop is running already, as in a notebook."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, work).result()
