"""`groupwise serve`: load the model that a config names, and answer until somebody ends it."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path

import uvicorn

from groupwise.config import Config
from groupwise.engines.identity import KEY_VARIABLE
from groupwise.engines.native import NativeEngine
from groupwise.errors import ConfigError
from groupwise.model.limits import find_limits
from groupwise.model.loading import LoadedModel, load_model, prepare_device, with_adapter
from groupwise.serve.app import Server
from groupwise.serve.follow import Followed
from groupwise.serve.served import Served

_GRACE_SECONDS = 5


def serve(config: Config, *, host: str, port: int, ready: Callable[[str], None], follow: Path | None = None) -> None:
    """Serve the model of `config`, with the adapter that it asks for, until SIGTERM or Ctrl-C.

    The key that clients must send is what the environment variable `GROUPWISE_API_KEY` holds, if it holds one.

    Args:
        port: 0 takes a free one.
        ready: called with the address, once it answers.
        follow: a run directory, whose newest checkpoint is served as it appears, in place of the config's model.

    Raises:
        ConfigError: the model cannot be loaded, or the address cannot be taken.
    """
    followed = None if follow is None else Followed.of(follow)
    opened = _opened(host, port)
    prepare_device(config.model.device)
    if followed is not None:
        loaded = followed.load(config.model)
    else:
        loaded = load_model(config.model)
        if config.lora.rank:
            loaded = with_adapter(loaded, config.lora, seed=config.train.seed)
    asyncio.run(_run(config, loaded, opened, ready, followed))


async def _run(
    config: Config,
    loaded: LoadedModel,
    opened: socket.socket,
    ready: Callable[[str], None],
    followed: Followed | None,
) -> None:
    engine = NativeEngine(loaded, config.rollout)
    served = Served(
        loaded,
        engine,
        name=config.model.path if followed is None else str(followed.run),
        positions=find_limits(loaded, config.model).positions,
    )
    if followed is not None:
        await engine.update_weights(followed.step)
        served.version = followed.step
    server = Server(
        served,
        key=os.environ.get(KEY_VARIABLE) or None,
        most=config.rollout.max_completion_tokens,
        follow=None if followed is None else partial(followed.follow, served),
    )
    settings = uvicorn.Config(
        server.app(),
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=_GRACE_SECONDS,
        timeout_keep_alive=600,
        lifespan="on",
    )
    running = uvicorn.Server(settings)
    address, port = opened.getsockname()[:2]
    work = asyncio.ensure_future(running.serve(sockets=[opened]))
    while not (running.started or work.done()):
        await asyncio.sleep(0.01)
    if running.started:
        ready(f"http://{address}:{port}")
    await work


def _opened(host: str, port: int) -> socket.socket:
    """Taken before the model is loaded, so that a wrong address is said at once."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    opened = socket.socket(family, socket.SOCK_STREAM)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        opened.bind((host, port))
    except OSError as error:
        opened.close()
        raise ConfigError(
            f"--host {host} --port {port}: {error.strerror or error}; give another, or --port 0"
        ) from error
    return opened
