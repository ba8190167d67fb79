"""HTTP to one server: answers, or an error that says whether asking again can help."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import httpx

from groupwise.errors import EngineError, EngineLost

_PROBE_SECONDS = 10.0
_ALIVE_SECONDS = 30.0
_PER_POOL = 8
"""httpx looks at every idle connection of a pool at each request: of 256 in one pool, a batch of 256 requests costs
6.4 s of this process's time, in pools of 8 it costs 0.35 s."""

_IDLE_SECONDS = 3.0
"""Servers close what is idle for five seconds (uvicorn's default); a request that meets that is lost."""

_GONE = frozenset({502, 503, 504})
_NO_KEY = frozenset({401, 403})


class Refused(EngineError):
    """The server answered, and did not do what it was asked.

    Attributes:
        status: of HTTP.
        said: its answer, shortened.
    """

    def __init__(self, url: str, status: int, said: str) -> None:
        super().__init__(f"{url} refused it ({status}): {said}")
        self.status = status
        self.said = said


class NoKey(Refused):
    """The server wants a key that it was not given, or another one."""

    def __init__(self, url: str, status: int, said: str) -> None:
        super().__init__(url, status, f"{said}; set GROUPWISE_API_KEY to the key that the server was started with")


class Connection:
    """Requests to the server at `url`.

    Args:
        most: requests under way at one time.
        headers: sent with every request, such as a key.
        alive: a route that answers while the server and what is behind it live; asked while another answer takes long.

    Example:
        connection = Connection("http://127.0.0.1:8000", most=256, alive="/health")
        answer = await connection.post("/inference/v1/generate", {"token_ids": [5, 6]})
    """

    def __init__(self, url: str, *, most: int, alive: str, headers: Mapping[str, str] | None = None) -> None:
        self.url = url.rstrip("/")
        self._headers = dict(headers or {})
        self._alive = alive
        self._pools = max(1, -(-(most + _PER_POOL) // _PER_POOL))
        self._clients: list[httpx.AsyncClient] = []
        self._running: list[int] = []

    async def get(self, route: str, *, seconds: float = _PROBE_SECONDS) -> Any:
        """The JSON there.

        Raises:
            EngineLost: nothing answers within `seconds`.
            Refused: the answer is an error.
        """
        async with _Borrowed(self) as client:
            try:
                return self._content(await client.get(route, timeout=seconds))
            except httpx.HTTPError as error:
                raise EngineLost(f"{self.url} does not answer: {_told(error)}") from error

    async def post(
        self,
        route: str,
        body: Mapping[str, Any] | str | None = None,
        *,
        seconds: float | None = None,
        query: Mapping[str, str] | None = None,
        watch: str = "",
    ) -> Any:
        """The answer's JSON, or its text where it is none.

        Args:
            body: JSON, as text or to be made of it.
            seconds: longest wait; None waits as long as the server lives, and asks it meanwhile.
            watch: a route that is asked meanwhile, where a call of a server that dies would not end.

        Raises:
            EngineLost: the server was lost.
            Refused: the answer is an error.
        """
        async with _Borrowed(self) as client:
            content = body if isinstance(body, str) else json.dumps(dict(body or {}))
            headers = {"Content-Type": "application/json"}
            sent = asyncio.ensure_future(
                client.post(route, content=content, params=query, headers=headers, timeout=seconds)
            )
            try:
                while not (await asyncio.wait({sent}, timeout=_PROBE_SECONDS))[0]:
                    if seconds is None or watch:
                        await self._lives(watch or self._alive)
                return self._content(sent.result())
            except httpx.HTTPError as error:
                raise EngineLost(f"{self.url} was lost: {_told(error)}") from error
            finally:
                sent.cancel()

    async def _lives(self, route: str) -> None:
        with suppress(Refused):  # it says no, so it lives
            await self.get(route, seconds=_ALIVE_SECONDS)

    def _content(self, answer: httpx.Response) -> Any:
        if answer.is_success:
            try:
                return answer.json()
            except ValueError:
                return answer.text
        said = " ".join(answer.text.split())[:500]
        if said.startswith("<"):
            said = "a page of HTML"
        if answer.status_code in _GONE:
            raise EngineLost(f"{self.url} is not there ({answer.status_code}): {said}")
        kind = NoKey if answer.status_code in _NO_KEY else Refused
        raise kind(self.url, answer.status_code, said)

    async def close(self) -> None:
        """Close what is open; the next request opens it again."""
        clients, self._clients, self._running = self._clients, [], []
        for client in clients:
            await client.aclose()

    def borrow(self) -> tuple[int, httpx.AsyncClient]:
        """The pool with the fewest requests."""
        if not self._clients:
            context = httpx.create_ssl_context()
            limits = httpx.Limits(
                max_connections=None, max_keepalive_connections=_PER_POOL, keepalive_expiry=_IDLE_SECONDS
            )
            self._clients = [
                httpx.AsyncClient(base_url=self.url, headers=self._headers, timeout=None, limits=limits, verify=context)
                for _ in range(self._pools)
            ]
            self._running = [0] * self._pools
        number = self._running.index(min(self._running))
        self._running[number] += 1
        return number, self._clients[number]

    def give_back(self, number: int) -> None:
        if number < len(self._running):  # else it was closed meanwhile
            self._running[number] -= 1


class _Borrowed:
    """One request's pool."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def __aenter__(self) -> httpx.AsyncClient:
        self._number, client = self._connection.borrow()
        return client

    async def __aexit__(self, *error: object) -> None:
        self._connection.give_back(self._number)


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
