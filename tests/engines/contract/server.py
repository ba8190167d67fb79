"""Servers that behave as vLLM, SGLang, LMDeploy and OpenAI-compatible ones do on the wire: what all of them share.

Real HTTP over a real tiny model on a CPU, so that an adapter's tests compare values and not shapes. What each server
does was read in the engines' wheels, or seen with vLLM on a CPU; a trap (`traps.py`) is what such an engine does when
it goes wrong, switched on by name. In a process of its own, or in a thread of a test:

    python -m tests.engines.contract.vllm --model DIR --port 8000 --enable-scale-out --trap half_load

    with server.serving(vllm.contract(folder)) as serving:
        serving.set_traps("half_load")
        httpx.post(serving.url + "/collective_rpc", json=…)

Beside an engine's own routes each app has `/_trap` (GET: those that are on; POST: exactly these from now, by name, with
their values) and `/_seen` (the requests that came, as method, path with its query, and body).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from tests.engines.contract.engine import Engine
from tests.engines.contract.model import ServedModel
from tests.engines.contract.traps import TRAPS, Traps

_LONGEST_KEPT = 100_000
"""Bytes of a body, or characters of a value, from which on they are not kept."""


@dataclass
class Contract:
    """A server before it runs.

    Attributes:
        token_paths: requests for tokens or scores; all others but the healthy ones are control calls.
        health_paths: answered while everything else hangs.
        errors: how what a route raises is answered.
        die: how the process ends; in a thread, every connection breaks and the port is closed.
    """

    engine: Engine
    routes: list[Route]
    token_paths: frozenset[str]
    health_paths: frozenset[str] = frozenset({"/health"})
    seen: list[tuple[str, str, Any]] = field(default_factory=list)
    die: Callable[[], None] = lambda: os._exit(1)
    errors: Mapping[Any, Any] = field(default_factory=dict)

    def app(self) -> ASGIApp:
        own = [
            Route("/_trap", self._trap, methods=["GET", "POST"]),
            Route("/_seen", self._seen_route, methods=["GET"]),
        ]
        return _Trapped(Starlette(routes=[*self.routes, *own], exception_handlers={**self.errors, Gone: _nobody}), self)

    async def _trap(self, request: Request) -> Response:
        traps = self.engine.traps
        if request.method == "POST":
            try:
                traps.set(await request.json())
            except ValueError as error:
                return JSONResponse({"error": str(error)}, status_code=400)
        return JSONResponse(traps.on)

    async def _seen_route(self, request: Request) -> Response:
        return JSONResponse(self.seen)


class _Trapped:
    """The traps of a process: dead, hanging, or deaf to control calls."""

    def __init__(self, app: ASGIApp, contract: Contract) -> None:
        self._app, self._contract = app, contract

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        if scope["type"] != "http" or path in ("/_trap", "/_seen"):
            await self._app(scope, receive, send)
            return
        contract, traps = self._contract, self._contract.engine.traps
        body = await _whole(receive)
        query = scope["query_string"].decode()
        contract.seen.append((scope["method"], path + ("?" + query if query else ""), _plain(body)))
        del contract.seen[:-1000]
        if path not in contract.health_paths:
            while "hangs" in traps or self._deaf(path):
                await asyncio.sleep(0.005)
        if path in contract.token_paths and "dies" in traps:
            left = traps.number("dies", 1) - 1
            traps.set(traps.on | {"dies": left})
            if left <= 0:
                traps.set({name: value for name, value in traps.on.items() if name != "dies"})
                contract.die()
                await asyncio.sleep(60)
        await self._app(scope, _again(body, receive), send)

    def _deaf(self, path: str) -> bool:
        traps = self._contract.engine.traps
        control = path not in self._contract.token_paths | {"/v1/models", "/health"}
        return "control_hangs" in traps and control and traps.text("control_hangs") in path


async def _whole(receive: Receive) -> bytes:
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if message["type"] == "http.disconnect" or not message.get("more_body"):
            return body


def _again(body: bytes, receive: Receive) -> Receive:
    """The body that was read already, and then what else comes: that the client has gone."""
    given = False

    async def once_more() -> Any:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return once_more


def _plain(body: bytes) -> Any:
    """A body as it is kept: without the weights that it may carry."""
    try:
        found = json.loads(body) if body else None
    except ValueError:
        return f"{len(body)} bytes"
    if not isinstance(found, dict) or len(body) < _LONGEST_KEPT:
        return found
    return {name: value if len(str(value)) < _LONGEST_KEPT else "left out" for name, value in found.items()}


class Gone(Exception):
    """The client went away."""


async def _nobody(request: Request, error: Exception) -> Response:
    return Response(status_code=499)


async def unless_gone(request: Request, engine: Engine, rid: str, work: Awaitable[Any]) -> Any:
    """Do the work; if the client goes, the request of this id is aborted."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request))
    await asyncio.wait([task, gone], return_when=asyncio.FIRST_COMPLETED)
    gone.cancel()
    if task.done():
        return task.result()
    engine.abort(lambda each: each == rid)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    raise Gone


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class Replayed:
    """The trap `duplicated`: what was answered before is answered again."""

    def __init__(self, traps: Traps) -> None:
        self._traps, self._last = traps, None

    def __call__(self, reply: Any) -> Any:
        if "duplicated" in self._traps and self._last is not None:
            return self._last
        self._last = reply
        return reply


# Running it


def make_engine(
    model: str | os.PathLike[str], traps: Sequence[str], *, context: int, caches: bool, dtype: str = "float32"
) -> Engine:
    held = Traps(traps)
    return Engine(ServedModel(os.fspath(model), held, dtype=dtype), held, context=context, caches=caches)


@dataclass
class Serving:
    """A server that runs in a thread.

    Attributes:
        contract: to look inside; it belongs to the server's thread.
    """

    url: str
    contract: Contract

    def set_traps(self, *named: str) -> None:
        """Exactly these are on from now, such as `"dies=3"`."""
        self.contract.engine.traps.set(Traps(named).on)


@contextlib.contextmanager
def serving(contract: Contract) -> Iterator[Serving]:
    """Run the server in a thread, on a port of its own."""
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(contract.app(), log_level="critical", lifespan="off"))

    def die() -> None:
        server.force_exit = server.should_exit = True
        for connection in list(server.server_state.connections):
            connection.transport.abort()  # type: ignore[union-attr]
        for each in server.servers:
            each.close()

    contract.die = die
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not server.started:
        if not thread.is_alive():
            raise RuntimeError("the contract server did not start")
        threading.Event().wait(0.002)
    try:
        yield Serving(f"http://127.0.0.1:{listening.getsockname()[1]}", contract)
    finally:
        server.should_exit = server.force_exit = True
        thread.join(10)


def parser(engine: str, *also: str) -> argparse.ArgumentParser:
    """The arguments of every server; each adds its own flags. `also` are other names for --model."""
    found = argparse.ArgumentParser(prog=f"python -m tests.engines.contract.{engine}")
    found.add_argument("--model", *also, dest="model", required=True, help="a Hugging Face folder")
    found.add_argument("--host", default="127.0.0.1")
    found.add_argument("--port", type=int, default=0, help="0: any free one, told on the first line of stdout")
    found.add_argument("--context", type=int, default=512, help="longest sequence, in tokens")
    found.add_argument(
        "--trap", action="append", default=[], metavar="NAME[=VALUE]", help="on from the start: " + ", ".join(TRAPS)
    )
    return found


def run(contract: Contract, host: str, port: int) -> None:
    """Serve until the process is ended; the first line of stdout is the address."""
    torch.set_num_threads(1)
    listening = socket.create_server((host, port))
    print(f"http://{host}:{listening.getsockname()[1]}", flush=True)
    uvicorn.Server(uvicorn.Config(contract.app(), log_level="warning", lifespan="off")).run(sockets=[listening])
