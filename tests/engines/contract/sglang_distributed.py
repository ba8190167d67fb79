"""SGLang's routes for weights that a trainer broadcasts: a group, a session, buckets.

As SGLang does: a bucket outside of a session is refused, and a session is not opened twice; the version and the cache
are what each bucket says of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tests.engines.contract.engine import Engine
from tests.engines.contract.groups import Groups
from tests.engines.contract.model import LoadFailed
from tests.engines.contract.sglang_wire import json_body


class Distributed:
    """The routes over one engine.

    Args:
        updated: told of a new version. flushed: whether the cache could be forgotten.
    """

    def __init__(self, engine: Engine, *, updated: Callable[[str], None], flushed: Callable[[], bool]) -> None:
        self._engine = engine
        self._updated, self._flushed = updated, flushed
        self._groups = Groups()
        self._session = False

    def routes(self) -> list[Route]:
        found = {
            "/init_weights_update_group": self.init,
            "/begin_weight_update": self.begin,
            "/update_weights_from_distributed": self.update,
            "/end_weight_update": self.end,
        }
        return [Route(path, handler, methods=["POST"]) for path, handler in found.items()]

    async def init(self, request: Request) -> Response:
        return _reply(*await self._groups.init(await json_body(request)))

    async def begin(self, request: Request) -> Response:
        if self._session:
            return _reply(False, "a weight-update session is already open; call end_weight_update() first")
        self._session = True
        return _reply(True, "Success")

    async def end(self, request: Request) -> Response:
        if not self._session:
            return _reply(False, "no weight-update session is open; call begin_weight_update() first")
        self._session = False
        return _reply(True, "Success")

    async def update(self, request: Request) -> Response:
        body = await json_body(request)
        if not self._session:
            return _reply(
                False, "update_weights_from_distributed must run between begin_weight_update() and end_weight_update()"
            )
        if body["group_name"] not in self._groups:
            return _reply(False, f"Failed to receive weights: Group {body['group_name']} not in [].")
        try:
            self._engine.model.load(await self._groups.receive(body, typed=False))
        except (LoadFailed, RuntimeError) as error:
            return _reply(False, f"Failed to update parameter online: {error}.")
        if body.get("weight_version") is not None:
            self._updated(body["weight_version"])
        if body.get("flush_cache", True) and not self._flushed():
            return _reply(
                False,
                "Weights were updated, but the cache was not flushed because requests are still running or queued. "
                "Retract or finish them, then call /flush_cache.",
            )
        return _reply(True, "Succeeded to update parameter online.")


def _reply(success: bool, message: str) -> Response:
    content: dict[str, Any] = {"success": success, "message": message}
    return JSONResponse(content, status_code=200 if success else 400)
