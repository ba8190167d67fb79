"""The routes: samples out, weights in."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

import torch
from pydantic import BaseModel, ValidationError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from torch import Tensor

from groupwise.engines import wire
from groupwise.engines.identity import model_identity
from groupwise.engines.native import NativeEngine
from groupwise.errors import DataError, EngineError, nearest
from groupwise.inputs import ModelInput, SampleKey
from groupwise.model.loading import LoadedModel
from groupwise.types import Completion, SampleRequest
from groupwise.weight_sync.folder import check_fits, read_weights

logger = logging.getLogger(__name__)

Body = TypeVar("Body", bound=BaseModel)


class Server:
    """One model behind the routes.

    Args:
        name: what the model is called.
        positions: most tokens of prompt and completion together; None where the model sets no bound.
        key: asked of every client in `Authorization: Bearer …`; None asks for nothing.
        max_body: most bytes of one request.
        max_requests: most samples under way; more are refused with 503.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        engine: NativeEngine,
        *,
        name: str,
        positions: int | None,
        key: str | None = None,
        max_body: int = 16 << 20,
        max_requests: int = 4096,
    ) -> None:
        self._loaded = loaded
        self._engine = engine
        self._name = name
        self._positions = positions
        self._key = key
        self._max_body = max_body
        self._max_requests = max_requests
        self._version = 0
        self._identity = model_identity(loaded)
        self._running = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._updating = asyncio.Lock()

    def app(self) -> Starlette:
        """The ASGI application."""
        routes = [
            Route(wire.GENERATE, self._generate, methods=["POST"]),
            Route(wire.MODELS, self._models, methods=["GET"]),
            Route(wire.HEALTH, self._health, methods=["GET"]),
            Route(wire.UPDATE_WEIGHTS, self._update, methods=["POST"]),
            Route(wire.ABORT, self._abort, methods=["POST"]),
        ]
        return Starlette(routes=routes, lifespan=self._lifespan)

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        yield
        await self._engine.abort()

    async def _health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok", "version": self._version})

    async def _models(self, request: Request) -> Response:
        if refused := self._unknown(request):
            return refused
        served = wire.ServedModel(
            identity=self._identity,
            exact=self._loaded.device.type == "cpu" or self._loaded.batch_invariant,
            device=self._loaded.device.type,
            version=self._version,
        )
        model = {"id": self._name, "object": "model", "max_model_len": self._positions}
        return JSONResponse({"object": "list", "data": [{**model, "groupwise": served.model_dump()}]})

    async def _generate(self, request: Request) -> Response:
        body = await self._read(request, wire.GenerateBody)
        if isinstance(body, Response):
            return body
        if self._running >= self._max_requests:
            return _refusal(503, f"{self._running} samples are under way, the most that this server takes")
        async with self._updating:  # new samples wait while weights change
            asked = self._asked(body)
            if asked.policy_version != self._version:
                return _refusal(409, f"other version: this server holds {self._version}, not {asked.policy_version}")
            self._running += 1
            self._idle.clear()
        try:
            completion = await self._sampled(asked, request)
        except EngineError as error:
            return _refusal(400, str(error))
        finally:
            self._running -= 1
            if not self._running:
                self._idle.set()
        if completion is None:
            return Response(status_code=499)  # nobody reads it
        reply = wire.reply_body(
            body.request_id or asked.id,
            completion.token_ids,
            completion.logprobs,
            finish_reason=completion.finish_reason,
            weight_versions=(
                wire.VersionSpan(version=str(asked.policy_version), start=0, end=len(completion.token_ids)),
            ),
        )
        return Response(reply.model_dump_json(), media_type="application/json")

    def _asked(self, body: wire.GenerateBody) -> SampleRequest:
        own = body.groupwise or wire.OwnKey(
            uid=body.request_id or "request", draw=0, sample_index=0, policy_version=self._version
        )
        place = len(body.token_ids) - own.continues
        return SampleRequest(
            SampleKey(own.uid, own.draw, own.sample_index),
            ModelInput.of(body.token_ids[:place]),
            body.sampling_params.params,
            continues=ModelInput.of(body.token_ids[place:]),
            resumed=min(own.resumed, own.continues),
            policy_version=own.policy_version,
            keeps=own.keeps,
        )

    async def _sampled(self, asked: SampleRequest, request: Request) -> Completion | None:
        """The completion; None when the client went away, whose sample ends then."""
        work = asyncio.ensure_future(self._drawn(asked))
        gone = asyncio.ensure_future(_disconnected(request))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            return work.result() if work.done() else None
        finally:
            gone.cancel()
            work.cancel()

    async def _drawn(self, asked: SampleRequest) -> Completion:
        async for completion in self._engine.generate([asked]):
            return completion
        raise EngineError(f"nothing was drawn for {asked.id}")

    async def _update(self, request: Request) -> Response:
        body = await self._read(request, wire.UpdateBody)
        if isinstance(body, Response):
            return body
        async with self._updating:
            folder, wanted = Path(body.path), self._trained()
            try:
                found = await asyncio.to_thread(read_weights, folder, version=body.version)
                check_fits(found, wanted, folder=folder)
            except DataError as error:
                logger.warning("version %d stays: %s", self._version, error)
                return _refusal(422, f"version {self._version} stays: {error}")
            await self._idle.wait()  # samples of the old version end with it
            with torch.no_grad():
                for name, tensor in found.items():
                    wanted[name].copy_(tensor)
            await self._engine.update_weights(body.version)
            self._version = body.version
        return JSONResponse({"version": self._version})

    def _trained(self) -> dict[str, Tensor]:
        """What training changes, by the names that a policy's source has."""
        model = self._loaded.model
        trained: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if self._loaded.adapter is None:
            saved = model.state_dict().keys()
            trained |= {name: buffer for name, buffer in model.named_buffers() if name in saved}
        return trained

    async def _abort(self, request: Request) -> Response:
        body = await self._read(request, wire.AbortBody)
        if isinstance(body, Response):
            return body
        await self._engine.abort(body.request_ids)
        return JSONResponse({})

    async def _read(self, request: Request, kind: type[Body]) -> Body | Response:
        """The request's body, or what to refuse it with."""
        if refused := self._unknown(request):
            return refused
        content = b""
        async for part in request.stream():
            content += part
            if len(content) > self._max_body:
                return _refusal(413, f"the request has more than {self._max_body:,} bytes")
        try:
            return kind.model_validate_json(content)
        except ValidationError as error:
            return _refusal(400, _problems(error, kind))

    def _unknown(self, request: Request) -> Response | None:
        given = request.headers.get("authorization", "")
        if self._key is None or hmac.compare_digest(given.encode(), f"Bearer {self._key}".encode()):
            return None
        return _refusal(401, "the key is missing or wrong; send it as Authorization: Bearer KEY")


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _refusal(status: int, message: str) -> Response:
    return Response(json.dumps({"error": message}), status_code=status, media_type="application/json")


def _problems(error: ValidationError, kind: type[BaseModel]) -> str:
    found: list[str] = []
    for problem in error.errors():
        where = ".".join(map(str, problem["loc"]))
        hint = ""
        if problem["type"] == "extra_forbidden":
            names = wire.SamplingBody.model_fields if "sampling_params" in where else kind.model_fields
            hint = nearest(str(problem["loc"][-1]), names, "; did you mean {!r}?")
        found.append(f"{where or 'the body'}: {problem['msg']}{hint}")
    return "; ".join(found)
