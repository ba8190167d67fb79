"""What every route does first: who asks, how much and how fast; and how it says no."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from groupwise.errors import GroupwiseError, nearest
from groupwise.serve.served import Busy, OtherVersion, Served
from groupwise.texts import one_line

Body = TypeVar("Body", bound=BaseModel)
Handler = Callable[[Request], Awaitable[Response]]

logger = logging.getLogger(__name__)

_BODY_SECONDS = 30.0
_MOST_KEYS = 256
_MOST_TOLD = 8
_LONGEST_SLIP = 100
"""Characters of a key that may be a slip in another."""

_GONE = 499
"""nginx's number for a client that closed its connection; nobody reads it."""


class Refusal(Exception):
    """An answer that says no.

    Attributes:
        code: OpenAI's word for it, where it has one.
    """

    def __init__(self, status: int, message: str, *, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code


class Front:
    """Stands before the routes.

    Args:
        key: asked of every client in `Authorization: Bearer …`; None asks for nothing.
        max_body: most bytes of one request.
    """

    def __init__(self, *, key: str | None, max_body: int = 16 << 20) -> None:
        self._key = key
        self._max_body = max_body
        self.answers: Counter[tuple[str, int]] = Counter()
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def route(self, handler: Handler, *, openai: bool = False, open_to_all: bool = False) -> Handler:
        """The handler, with every refusal turned into an answer, and counted.

        Args:
            openai: answer errors in the form that OpenAI's clients read.
            open_to_all: no key is asked for, as of a probe.
        """

        async def answered(request: Request) -> Response:
            started, path = time.perf_counter(), request.url.path
            try:
                if not open_to_all:
                    self._check_key(request)
                response = await handler(request)
            except Refusal as refusal:
                response = _refused(refusal, openai=openai)
            except Busy as error:
                response = _refused(Refusal(503, str(error), code="overloaded"), openai=openai)
                response.headers["Retry-After"] = "1"
            except OtherVersion as error:
                response = _refused(Refusal(409, str(error)), openai=openai)
            except GroupwiseError as error:
                response = _refused(Refusal(400, str(error)), openai=openai)
            except ClientDisconnect:
                response = Response(status_code=_GONE)
            except Exception:  # whatever it is, its client is told, and the server goes on
                logger.exception("%s failed", path)
                response = _refused(Refusal(500, "the server failed; its log says where"), openai=openai)
            self.answers[path, response.status_code] += 1
            self.seconds[path] += time.perf_counter() - started
            return response

        return answered

    def _check_key(self, request: Request) -> None:
        given = request.headers.get("authorization", "")
        if self._key is not None and not hmac.compare_digest(given.encode("latin-1"), f"Bearer {self._key}".encode()):
            raise Refusal(
                401, "the key is missing or wrong; send it as Authorization: Bearer KEY", code="invalid_api_key"
            )

    async def read(self, request: Request, kind: type[Body]) -> Body:
        """The request's body.

        Raises:
            Refusal: it is too large, too slow, no JSON, or has what the route does not take.
        """
        content = bytearray()
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                async for part in request.stream():
                    content += part
                    if len(content) > self._max_body:
                        raise Refusal(413, f"the request has more than {self._max_body:,} bytes")
        except TimeoutError:
            raise Refusal(408, f"the request took more than {_BODY_SECONDS:g} seconds to come") from None
        try:
            given: Any = from_json(bytes(content))
        except ValueError as error:
            raise Refusal(400, f"the body: Invalid JSON: {error}") from error
        _check_width(given)
        try:
            return kind.model_validate(given)
        except ValidationError as error:
            raise Refusal(400, _problems(error, kind)) from error

    def metrics(self, served: Served) -> str:
        """In the text form of Prometheus."""
        lines = [
            *_metric("groupwise_requests_total", "counter", "Answers by route and status."),
            *(
                f'groupwise_requests_total{{route="{route}",status="{status}"}} {count}'
                for (route, status), count in sorted(self.answers.items())
            ),
            *_metric("groupwise_request_seconds_total", "counter", "Seconds from request to answer, by route."),
            *(
                f'groupwise_request_seconds_total{{route="{route}"}} {seconds:.6f}'
                for route, seconds in sorted(self.seconds.items())
            ),
            *_metric("groupwise_tokens_total", "counter", "Tokens drawn."),
            f"groupwise_tokens_total {served.tokens}",
            *_metric("groupwise_samples_running", "gauge", "Samples under way, those that wait included."),
            f"groupwise_samples_running {served.running}",
            *_metric("groupwise_weights_version", "gauge", "Version of the weights that are served."),
            f"groupwise_weights_version {served.version}",
        ]
        return "\n".join(lines) + "\n"


async def unless_gone(request: Request, work: Awaitable[Any]) -> Any:
    """The work's outcome; a client that goes away ends it.

    Raises:
        ClientDisconnect: it went.
    """
    doing = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({doing, gone}, return_when=asyncio.FIRST_COMPLETED)
        if doing.done():
            return doing.result()
        raise ClientDisconnect
    finally:
        gone.cancel()
        doing.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _refused(refusal: Refusal, *, openai: bool) -> Response:
    if not openai:
        text = json.dumps({"error": refusal.message})
        return Response(text, status_code=refusal.status, media_type="application/json")
    kind = "invalid_request_error" if refusal.status < 500 else "server_error"
    error = {"message": refusal.message, "type": kind, "param": None, "code": refusal.code}
    return JSONResponse({"error": error}, status_code=refusal.status)


def _check_width(given: Any) -> None:
    """Each key that is not known would be a problem of its own, to be found and told."""
    if isinstance(given, dict):
        body: dict[str, Any] = given
        widest = max(len(each) for each in [body, *(value for value in body.values() if isinstance(value, dict))])
        if widest > _MOST_KEYS:
            raise Refusal(400, f"the body: it has {widest:,} keys in one place; expected at most {_MOST_KEYS}")


def _problems(error: ValidationError, kind: type[BaseModel]) -> str:
    found = error.errors(include_url=False, include_input=False)
    said = [_problem(problem["loc"], problem["type"], problem["msg"], kind) for problem in found[:_MOST_TOLD]]
    return "; ".join(said) + (f"; and {len(found) - _MOST_TOLD} more" if len(found) > _MOST_TOLD else "")


def _problem(loc: tuple[int | str, ...], what: str, said: str, kind: type[BaseModel]) -> str:
    hint = ""
    if what == "extra_forbidden" and len(str(loc[-1])) <= _LONGEST_SLIP:
        inside = kind.model_fields.get(str(loc[0]))
        nested = getattr(inside and inside.annotation, "model_fields", None)
        hint = nearest(str(loc[-1]), nested or kind.model_fields, "; did you mean {!r}?")
    where = ".".join(one_line(str(part)) for part in loc)
    return f"{where or 'the body'}: {said.removeprefix('Value error, ')}{hint}"


def _metric(name: str, kind: str, text: str) -> list[str]:
    return [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
