"""The application: one model behind all routes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from groupwise.engines import wire
from groupwise.serve.front import Front
from groupwise.serve.openai import OpenAi
from groupwise.serve.served import Served
from groupwise.serve.token_wire import TokenWire

METRICS = "/metrics"


class Server:
    """Routes for runs (`groupwise.serve.token_wire`), for everybody (`groupwise.serve.openai`) and for watchers.

    Args:
        key: asked of every client in `Authorization: Bearer …`; None asks for nothing.
        most: tokens of an answer for which a client names no bound.
        follow: work beside serving, such as loading a run's newest weights; then no client may send any.
        max_body: most bytes of one request.
    """

    def __init__(
        self,
        served: Served,
        *,
        key: str | None = None,
        most: int = 512,
        follow: Callable[[], Coroutine[Any, Any, None]] | None = None,
        max_body: int = 16 << 20,
    ) -> None:
        self._served = served
        self._follow = follow
        self._front = Front(key=key, max_body=max_body)
        self._wire = TokenWire(served, self._front, takes_weights=follow is None)
        self._openai = OpenAi(served, self._front, most=most)

    def app(self) -> Starlette:
        """The ASGI application."""
        routes = [
            *self._wire.routes(),
            *self._openai.routes(),
            Route(wire.HEALTH, self._front.route(self._health, open_to_all=True), methods=["GET"]),
            Route(METRICS, self._front.route(self._metrics, open_to_all=True), methods=["GET"]),
        ]
        return Starlette(routes=routes, lifespan=self._lifespan)

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        following = None if self._follow is None else asyncio.ensure_future(self._follow())
        yield
        if following is not None:
            following.cancel()
        await self._served.abort()

    async def _health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok", "version": self._served.version})

    async def _metrics(self, request: Request) -> Response:
        return PlainTextResponse(self._front.metrics(self._served), media_type="text/plain; version=0.0.4")
