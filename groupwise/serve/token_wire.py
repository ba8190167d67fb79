"""The token wire: tokens in, tokens and log-probs out; and weights in, for a run that samples here."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from torch import Tensor

from groupwise.engines import wire
from groupwise.engines.identity import model_identity
from groupwise.engines.told import npy_text
from groupwise.errors import DataError
from groupwise.inputs import ModelInput, SampleKey
from groupwise.serve.front import Front, Refusal, unless_gone
from groupwise.serve.served import Served
from groupwise.sides import NUMPY_TYPES, Routes
from groupwise.types import Completion, SampleRequest
from groupwise.weight_sync.folder import check_fits, read_weights

logger = logging.getLogger(__name__)


class TokenWire:
    """Routes over one model.

    Args:
        takes_weights: a run may send new ones; a server that follows a run takes none.
    """

    def __init__(self, served: Served, front: Front, *, takes_weights: bool = True) -> None:
        self._served = served
        self._front = front
        self._takes_weights = takes_weights
        self._identity = model_identity(served.loaded)

    def routes(self) -> list[Route]:
        """For the application."""
        front = self._front
        return [
            Route(wire.GENERATE, front.route(self._generate), methods=["POST"]),
            Route(wire.MODELS, front.route(self._models, openai=True), methods=["GET"]),
            Route(wire.UPDATE_WEIGHTS, front.route(self._update), methods=["POST"]),
            Route(wire.ABORT, front.route(self._abort), methods=["POST"]),
        ]

    async def _models(self, request: Request) -> Response:
        loaded = self._served.loaded
        told = wire.ServedModel(
            identity=self._identity,
            exact=loaded.device.type == "cpu" or loaded.batch_invariant,
            device=loaded.device.type,
            version=self._served.version,
            routes=self._served.tells_routes,
        )
        model = {"id": self._served.name, "object": "model", "owned_by": "groupwise", "created": 0}
        model |= {"max_model_len": self._served.positions, "groupwise": told.model_dump()}
        return JSONResponse({"object": "list", "data": [model]})

    async def _generate(self, request: Request) -> Response:
        body = await self._front.read(request, wire.GenerateBody)
        positions, given = self._served.positions, len(body.token_ids)
        if positions is not None and given >= positions:
            raise Refusal(
                400, f"token_ids: the model has {positions} positions, and {given:,} leave none for an answer"
            )
        asked = self._asked(body)
        if asked.wants_routes and not self._served.tells_routes:
            raise Refusal(400, "groupwise.routes_from: this server's model has no experts, or is on a GPU")
        if asked.routes_from > given:
            raise Refusal(400, f"groupwise.routes_from = {asked.routes_from} is beyond {given:,} token_ids")
        completion: Completion = await unless_gone(request, self._served.draw(asked))
        reply = wire.reply_body(
            body.request_id or asked.id,
            completion.token_ids,
            completion.logprobs,
            finish_reason=completion.finish_reason,
            weight_versions=(
                wire.VersionSpan(version=str(asked.policy_version), start=0, end=len(completion.token_ids)),
            ),
            routed_experts=_routed(completion.sides.routes),
        )
        return Response(reply.model_dump_json(exclude_none=True), media_type="application/json")

    def _asked(self, body: wire.GenerateBody) -> SampleRequest:
        # Without a seed, and without a key, no two requests draw alike.
        uid = uuid.uuid4().hex if body.sampling_params.seed is None else body.request_id or "request"
        own = body.groupwise or wire.OwnKey(uid=uid, draw=0, sample_index=0, policy_version=self._served.version)
        place = len(body.token_ids) - own.continues
        return SampleRequest(
            SampleKey(own.uid, own.draw, own.sample_index),
            ModelInput.of(body.token_ids[:place]),
            body.sampling_params.params,
            continues=ModelInput.of(body.token_ids[place:]),
            resumed=min(own.resumed, own.continues),
            policy_version=own.policy_version,
            keeps=own.keeps,
            wants_routes=own.routes_from is not None,
            routes_from=own.routes_from or 0,
        )

    async def _update(self, request: Request) -> Response:
        body = await self._front.read(request, wire.UpdateBody)
        if not self._takes_weights:
            raise Refusal(403, "this server follows a run, and takes weights from nobody else")
        folder, version = Path(body.path), self._served.version

        def read(wanted: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
            found = read_weights(folder, version=body.version, held=(version, wanted))
            check_fits(found, dict(wanted), folder=folder)
            return found

        try:
            await self._served.update(body.version, read)
        except DataError as error:
            logger.warning("version %d stays: %s", version, error)
            raise Refusal(422, f"version {version} stays: {error}") from error
        return JSONResponse({"version": self._served.version})

    async def _abort(self, request: Request) -> Response:
        body = await self._front.read(request, wire.AbortBody)
        await self._served.abort(body.request_ids)
        return JSONResponse({})


def _routed(routes: Routes | None) -> str | None:
    """For the wire, `[rows, layers, k]`."""
    if routes is None:
        return None
    numbers = np.frombuffer(routes.data, NUMPY_TYPES[routes.dtype])
    return npy_text(numbers.reshape(routes.rows, routes.layers, routes.k))
