"""An engine in other processes, made of a config: which servers, in which dialect, found or started."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from groupwise.config import RolloutConfig
from groupwise.engines.commands import Command, Start, command_of
from groupwise.engines.connection import Connection
from groupwise.engines.dialects.base import TELLS_NOTHING, Dialect, Facts, Tells
from groupwise.engines.dialects.lmdeploy import LmDeploy
from groupwise.engines.dialects.openai import OpenAi
from groupwise.engines.dialects.own import Own
from groupwise.engines.dialects.sglang import SgLang
from groupwise.engines.dialects.vllm import Vllm
from groupwise.engines.http import HttpEngine
from groupwise.engines.identity import KEY_VARIABLE
from groupwise.engines.launch import EngineProcess, ports, shared_out
from groupwise.engines.member import Launcher, Member
from groupwise.engines.tellings import has_gpu
from groupwise.engines.weights import WeightRef
from groupwise.errors import ConfigError, EngineError, EngineLost
from groupwise.sides import Mixture

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
        logprobs: the engine has those of what it draws from (`groupwise.engines.has_logprobs`).
        exact: what a server of Groupwise's says of itself.
        broadcasts: weights are broadcast to it.
        tells: what is learned from beside tokens.
    """

    stop_token_ids: Sequence[int]
    adapter: bool = False
    logprobs: bool = True
    exact: bool = True
    broadcasts: bool = False
    tells: Tells = TELLS_NOTHING


def dialect_of(name: str, speaks: Speaks) -> Dialect:
    """How a server of that name is spoken to."""
    if name == "http":
        return Own(exact=speaks.exact, tells=speaks.tells)
    if name == "lmdeploy":
        return LmDeploy(logprobs=speaks.logprobs, broadcasts=speaks.broadcasts)
    if name == "openai":
        return OpenAi()
    kinds = {"vllm": Vllm, "sglang": SgLang}
    kind = "adapter" if speaks.adapter else "model"
    return kinds[name](kind=kind, stop_token_ids=speaks.stop_token_ids, tells=speaks.tells)


def reach(config: RolloutConfig, *, trains: bool = True, tells: Tells = TELLS_NOTHING) -> list[Facts]:
    """What the servers at `rollout.urls` say of themselves; nothing where none is given.

    Args:
        tells: what they are to tell beside tokens, which is tried.

    Raises:
        ConfigError: one does not answer, is of another kind, or cannot be trained over.
    """
    found = _in_a_loop(_reach(config, tells)) if config.urls else []
    if trains and (problems := [facts.problem for facts in found if facts.problem]):
        raise ConfigError(f"rollout.urls: {problems[0]}")
    return found


async def _reach(config: RolloutConfig, tells: Tells) -> list[Facts]:
    dialect = dialect_of(config.engine, Speaks((), broadcasts=config.weights_by == "nccl", tells=tells))
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
    mixture: Mixture | None = None,
) -> HttpEngine:
    """The engine; a server that is to be started is started with the first weights.

    Args:
        decode: token ids to text, special tokens left out.
        encode: and back, for a server that gives text alone.
        vocabulary: tokens from 0 up to this are the model's.
        launchers: the address of each server that is started, and what starts it.
        mixture: the model's routers, where their choices are wanted.
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
        mixture=mixture,
    )


@dataclass(frozen=True, slots=True)
class Launched:
    """What the run's own servers are started with.

    Attributes:
        base: of an adapter: folder or Hub name.
        length: tokens of the longest prompt and completion.
        logs: folder for what they print.
        routes: they are to tell which experts they chose.
    """

    base: str
    length: int
    dtype: str
    seed: int
    lora_rank: int
    logs: Path
    routes: bool = False


def launchers(config: RolloutConfig, launched: Launched) -> list[tuple[str, Launcher]]:
    """The address of each server that is to be started, and what starts it; none where `rollout.urls` has them.

    Raises:
        ConfigError: a port is taken, or GPUs cannot be shared out.
    """
    launch = config.launch
    if config.urls or launch.python is None:
        return []
    found: list[tuple[str, Launcher]] = []
    dialect = dialect_of(config.engine, Speaks(()))
    for number, (port, gpus) in enumerate(zip(ports(config), shared_out(launch.gpus, launch.replicas), strict=True)):
        start = Start(
            python=launch.python,
            model=launched.base,
            port=port,
            length=launch.max_model_len or launched.length,
            dtype=launched.dtype,
            seed=launched.seed,
            rollout=config,
            lora_rank=launched.lora_rank,
            gpus=gpus,
            on_gpu=has_gpu(),
            routes=launched.routes,
        )
        url = f"http://127.0.0.1:{port}"
        process = EngineProcess(
            partial(_started_with, config.engine, start),
            url=url,
            health=dialect.health,
            log=launched.logs / f"{config.engine}-{number}.log",
            ready_seconds=launch.ready_seconds,
        )
        found.append((url, process))
    return found


def _started_with(engine: str, start: Start, ref: WeightRef) -> Command:
    """A whole model is what the server begins with; an adapter comes to its base."""
    return command_of(engine, start if ref.kind == "adapter" else replace(start, model=str(ref.folder)))


def _connection(dialect: Dialect, url: str, *, most: int) -> Connection:
    key = os.environ.get(KEY_VARIABLE)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return Connection(url, most=most + _SPARE, alive=dialect.alive, headers=headers)


def _in_a_loop(work: Coroutine[Any, Any, T]) -> T:
    """Run it to its end, also where an event loop is running already, as in a notebook."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, work).result()
