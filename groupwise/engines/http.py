"""An engine in another process, behind the token wire (`groupwise.engines.wire`).

One request per sample, each with its own key, so a request that was lost is asked again and gives the same tokens. A
server that comes back has forgotten its weights: they are sent again first.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
from pydantic import BaseModel, ValidationError

from groupwise.config import RolloutConfig
from groupwise.engines import wire
from groupwise.errors import ConfigError, EngineError, EngineLost
from groupwise.types import Completion, EngineCaps, SampleRequest

logger = logging.getLogger(__name__)

_PROBE_SECONDS = 10.0
_FIRST_WAIT, _LONGEST_WAIT = 0.1, 2.0
_START_SECONDS = 10.0


class HttpEngine:
    """Implements `groupwise.protocols.Engine` over a server at `rollout.url`.

    Args:
        decode: token ids to text, special tokens left out.
        vocabulary: tokens from 0 up to this are the model's.
        headers: sent with every request, such as a key.

    Raises:
        ConfigError: nothing answers there, or it is no server of Groupwise's.
    """

    def __init__(
        self,
        config: RolloutConfig,
        *,
        decode: Callable[[Sequence[int]], str],
        vocabulary: int,
        headers: dict[str, str] | None = None,
    ) -> None:
        assert config.url is not None, "checked with the config"
        self._url = config.url.rstrip("/")
        self._timeout = config.engine_timeout
        self._most = config.max_concurrent_samples
        self._headers = headers or {}
        self._decode = decode
        self._vocabulary = vocabulary
        self._loaded: tuple[int, Path] | None = None
        self._client: httpx.AsyncClient | None = None
        self._mending = asyncio.Lock()
        self.served = self._reach()

    @property
    def caps(self) -> EngineCaps:
        return EngineCaps(name="http", exact_logprobs=self.served.exact, seeded=True)

    def _reach(self) -> wire.ServedModel:
        """What the server says of itself, once, before anything else is done."""
        deadline = time.monotonic() + _START_SECONDS
        while True:
            try:
                answer = httpx.get(self._url + wire.MODELS, headers=self._headers, timeout=_START_SECONDS)
                answer.raise_for_status()
                return _served(answer.json(), self._url)
            except (httpx.HTTPError, ValueError) as error:
                if time.monotonic() > deadline or isinstance(error, httpx.HTTPStatusError):
                    raise ConfigError(
                        f"rollout.url = {self._url!r}: no engine answers there ({type(error).__name__}: {error}); "
                        "start one with `groupwise serve`, or correct the address"
                    ) from error
            time.sleep(0.2)

    async def generate(self, requests: Sequence[SampleRequest]) -> AsyncIterator[Completion]:
        """Yield one completion per request, as each finishes; a lost server is waited for.

        Raises:
            EngineLost: it did not come back within `rollout.engine_timeout`.
            EngineError: it answered what is no answer to the request.
        """
        tasks = [asyncio.ensure_future(self._completion(request)) for request in requests]
        try:
            for done in asyncio.as_completed(tasks):
                yield await done
        finally:
            for task in tasks:
                task.cancel()

    async def _completion(self, request: SampleRequest) -> Completion:
        reply = await self._asked_again(wire.GENERATE, _body(request), version=request.policy_version)
        try:
            choice = wire.GenerateReply.model_validate(reply).choices[0]
        except ValidationError as error:
            raise EngineError(f"{self._url} answered {request.id} with what is no completion: {error}") from error
        return self._checked(request, choice)

    def _checked(self, request: SampleRequest, choice: wire.Choice) -> Completion:
        logprobs = tuple(each.logprob for each in choice.logprobs.content)
        wrong = ""
        if len(logprobs) != len(choice.token_ids):
            wrong = f"{len(logprobs)} log-probs for {len(choice.token_ids)} tokens"
        elif choice.token_ids != tuple(each.token_id for each in choice.logprobs.content):
            wrong = "log-probs of other tokens"
        elif not all(math.isfinite(value) and value > -9999.0 for value in logprobs):
            wrong = "a log-prob that stands for a missing one"
        elif choice.token_ids and not 0 <= min(choice.token_ids) <= max(choice.token_ids) < self._vocabulary:
            wrong = f"token {max(choice.token_ids)}, of a vocabulary of {self._vocabulary}"
        elif any(span.version != str(request.policy_version) for span in choice.weight_versions):
            found = ", ".join(span.version for span in choice.weight_versions)
            wrong = f"samples of version {found}, and not {request.policy_version}"
        if wrong:
            raise EngineError(f"{self._url} answered {request.id} with {wrong}")
        return Completion(
            key=request.key,
            token_ids=choice.token_ids,
            logprobs=logprobs,
            policy_versions=(request.policy_version,) * len(logprobs),
            text=self._decode(choice.token_ids),
            finish_reason=choice.finish_reason,
        )

    async def _asked_again(self, route: str, body: BaseModel, *, version: int) -> Any:
        """The answer, however often the server goes away meanwhile."""
        deadline = time.monotonic() + self._timeout
        pause = _FIRST_WAIT
        while True:
            try:
                return await self._post(route, body)
            except _OtherVersion:
                await self._mend(version)
            except EngineLost as lost:
                if time.monotonic() > deadline:
                    raise
                logger.warning("%s; asking again", lost)
                await asyncio.sleep(pause)
                pause = min(2 * pause, _LONGEST_WAIT)
                await self._mend(version, deadline=deadline)

    async def _mend(self, version: int, *, deadline: float | None = None) -> None:
        """Bring the server to `version` again, if it came back without it; one caller does it for all."""
        async with self._mending:
            held = await self._version(deadline)
            if held == version:
                return
            if self._loaded is None or self._loaded[0] != version:
                raise EngineError(f"{self._url} holds version {held} of the weights, and {version} is asked for")
            await self._send(*self._loaded)

    async def _version(self, deadline: float | None) -> int:
        pause = _FIRST_WAIT
        while True:
            try:
                return _served(await self._get(wire.MODELS), self._url).version
            except EngineLost:
                if deadline is None or time.monotonic() > deadline:
                    raise
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_WAIT)

    async def load(self, version: int, folder: Path) -> None:
        """Serve the weights in `folder` as `version`; they are sent again to a server that comes back.

        Raises:
            EngineError: the server refuses them, and goes on serving what it has.
        """
        deadline, pause = time.monotonic() + self._timeout, _FIRST_WAIT
        while True:
            try:
                await self._send(version, folder)
                break
            except EngineLost:
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(pause)
                pause = min(2 * pause, _LONGEST_WAIT)
        self._loaded = version, folder

    async def _send(self, version: int, folder: Path) -> None:
        answer = await self._post(wire.UPDATE_WEIGHTS, wire.UpdateBody(version=version, path=str(folder)))
        if answer.get("version") != version:
            raise EngineError(f"{self._url} took version {version} of the weights and says {answer!r}")

    async def abort(self, request_ids: Sequence[str] | None = None) -> None:
        """End these requests (or all) now."""
        names = None if request_ids is None else tuple(request_ids)
        await self._post(wire.ABORT, wire.AbortBody(request_ids=names))

    async def close(self) -> None:
        """Close the connections; the server goes on."""
        if self._client is not None:
            client, self._client = self._client, None
            await client.aclose()

    async def _get(self, route: str) -> Any:
        try:
            answer = await self._connection().get(route, timeout=_PROBE_SECONDS)
        except httpx.HTTPError as error:
            raise EngineLost(f"{self._url} does not answer: {type(error).__name__}: {error}") from error
        return self._content(answer)

    async def _post(self, route: str, body: BaseModel) -> Any:
        """The answer; while it takes long, the server is asked whether it lives."""
        content = body.model_dump_json(exclude_none=True)
        sent = asyncio.ensure_future(
            self._connection().post(route, content=content, headers={"Content-Type": "application/json"})
        )
        try:
            while not (await asyncio.wait({sent}, timeout=_PROBE_SECONDS))[0]:
                await self._get(wire.HEALTH)
            return self._content(sent.result())
        except httpx.HTTPError as error:
            raise EngineLost(f"{self._url} was lost: {type(error).__name__}: {error}") from error
        finally:
            sent.cancel()

    def _content(self, answer: httpx.Response) -> Any:
        if answer.is_success:
            return answer.json()
        said = answer.text.strip()[:500]
        if answer.status_code == 409 and "other version" in said:
            raise _OtherVersion(said)
        kind = EngineLost if answer.status_code in (502, 503, 504) else EngineError
        raise kind(f"{self._url} refused it ({answer.status_code}): {said}")

    def _connection(self) -> httpx.AsyncClient:
        if self._client is None:
            limits = httpx.Limits(max_connections=self._most + 8, max_keepalive_connections=self._most + 8)
            self._client = httpx.AsyncClient(base_url=self._url, headers=self._headers, timeout=None, limits=limits)
        return self._client


class _OtherVersion(Exception):
    """The server holds weights of another version than the request asks for."""


def _served(answer: Any, url: str) -> wire.ServedModel:
    try:
        return wire.ServedModel.model_validate(answer["data"][0]["groupwise"])
    except (KeyError, IndexError, TypeError, ValidationError) as error:
        raise ConfigError(
            f"rollout.url = {url!r} is a server, but none of `groupwise serve`: it does not say what model it has "
            f"({type(error).__name__})"
        ) from error


def _body(request: SampleRequest) -> wire.GenerateBody:
    return wire.GenerateBody(
        request_id=request.id,
        token_ids=request.prompt.token_ids + request.continues.token_ids,
        sampling_params=wire.SamplingBody.of(request.sampling),
        groupwise=wire.OwnKey(
            uid=request.key.uid,
            draw=request.key.draw,
            sample_index=request.key.sample_index,
            continues=len(request.continues),
            resumed=request.resumed,
            policy_version=request.policy_version,
            keeps=request.keeps,
        ),
    )
