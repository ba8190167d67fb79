"""LMDeploy's routes for weights that a trainer broadcasts: a group, and buckets, of which the last is `finished`. How
many GPUs it has is JSON in a text of JSON."""

from __future__ import annotations

import json

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tests.engines.contract.engine import Engine
from tests.engines.contract.groups import Groups
from tests.engines.contract.model import LoadFailed


class Distributed:
    """The routes over one engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._groups = Groups()

    def routes(self) -> list[Route]:
        return [
            Route("/distserve/engine_info", self.info),
            Route("/init_weights_update_group", self.init, methods=["POST"]),
            Route("/update_weights_from_distributed", self.update, methods=["POST"]),
        ]

    async def info(self, request: Request) -> Response:
        return JSONResponse(json.dumps({"tp_size": 1, "dp_size": 1, "pp_size": None, "ep_size": 1}))

    async def init(self, request: Request) -> Response:
        return _reply(*await self._groups.init(await request.json()))

    async def update(self, request: Request) -> Response:
        body = await request.json()
        name = body["group_name"]
        if name not in self._groups:
            return _reply(False, f"group {name!r} not initialized. Call init_weights_update_group first.")
        try:
            tensors = await self._groups.receive(body, typed=True)
            self._engine.model.load(tensors, packs=bool(body.get("finished")))
        except (LoadFailed, RuntimeError) as error:
            return _reply(
                False,
                f"Failed to update parameter online: {error}. The model weights are partially updated; please discard "
                "them and reload.",
            )
        return _reply(True, "Succeeded to update parameter online.")


def _reply(success: bool, message: str) -> Response:
    return JSONResponse({"success": success, "message": message}, status_code=200 if success else 400)
