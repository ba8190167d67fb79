"""LMDeploy 0.18 (PyTorch engine) on the wire: `/generate`, chat by token ids, weights as pickled buckets.

What it does as LMDeploy does: `/generate` has neither seed nor n, and unknown keys are ignored; a temperature that is
not given is 0.8 and a top_k 50; the token that ends an answer is dropped with its log-prob unless
`include_stop_str_in_output`; `ignore_eos` forbids the tokens that would end an answer; log-probs are those of the
logits, before the temperature; `/update_weights` answers null, and the output head is packed again only by the bucket
that is `finished`; what is broadcast comes by a group that was met before; a session's number that an inner session
happens to have is refused as occupied, and one that is in use already is an error of the server. There is no version,
no pause, no folder, and without --enable-abort-handling no abort.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from tests.engines.contract import server
from tests.engines.contract.buckets import named_tensors
from tests.engines.contract.engine import Answer, Busy, Dead, Draw
from tests.engines.contract.lmdeploy_distributed import Distributed
from tests.engines.contract.model import LoadFailed

CHAT = "/v1/chat/completions"
TEMPERATURE, TOP_K, MAX_TOKENS = 0.8, 50, 128
"""What a request gets that does not say; a model's generation_config.json comes before."""


@dataclass(frozen=True)
class Flags:
    """How it was started; names are LMDeploy's, defaults too."""

    session_len: int = 512
    logprobs_mode: str | None = None
    enable_abort_handling: bool = False
    enable_prefix_caching: bool = False
    model_name: str | None = None
    api_key: str | None = None

    @staticmethod
    def as_it_should() -> Flags:
        """Started as an adapter ought to start it."""
        return Flags(logprobs_mode="raw_logprobs", enable_abort_handling=True)


class LmdeployError(Exception):
    """An error in LMDeploy's shape."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status
        kind = "server_error" if status >= 500 else "not_found_error" if status == 404 else "invalid_request_error"
        self.body = {"message": message, "type": kind, "code": status, "param": None, "object": "error"}


class Lmdeploy:
    """The routes over one engine."""

    def __init__(self, model: str | Path, flags: Flags, traps: list[str]) -> None:
        self.flags = flags
        caches = flags.enable_prefix_caching
        self.engine = server.make_engine(model, traps, context=flags.session_len, caches=caches)
        self.name = flags.model_name or str(model)
        self._numbers = itertools.count()
        self._inner: dict[int, int | None] = {}
        """Sessions that run, by the engine's number: the client's."""
        self._replayed = server.Replayed(self.engine.traps)
        self._distributed = Distributed(self.engine)

    def contract(self) -> server.Contract:
        post = ["POST"]
        routes = [
            Route("/health", self.health),
            Route("/v1/models", self.models),
            Route("/generate", self.generate, methods=post),
            Route(CHAT, self.chat, methods=post),
            Route("/update_weights", self.update_weights, methods=post),
            Route("/abort_request", self.abort_request, methods=post),
            Route("/sleep", self.sleep, methods=post),
            Route("/wakeup", self.wakeup, methods=post),
            Route("/is_sleeping", self.is_sleeping),
            *self._distributed.routes(),
        ]
        for route in routes[1:]:  # all but the health are behind the key
            route.app = self._behind_the_key(route.app)
        errors = {LmdeployError: _error, Busy: _busy, Dead: _dead}
        return server.Contract(self.engine, routes, frozenset({"/generate", CHAT}), errors=errors)

    def _behind_the_key(self, app: ASGIApp) -> ASGIApp:
        async def checked(scope: Scope, receive: Receive, send: Send) -> None:
            given = Request(scope).headers.get("authorization")
            if self.flags.api_key and given != f"Bearer {self.flags.api_key}":
                raise LmdeployError("Please request with valid api key!", 401)
            await app(scope, receive, send)

        return checked

    # Tokens

    async def generate(self, request: Request) -> Response:
        body = await _json(request)
        ids = self._ids(body)
        start = body.get("logprob_start_len", -1)
        most = body.get("max_tokens", MAX_TOKENS)
        self._check_logprobs(body)
        if start >= 0:
            if not body.get("return_logprob"):
                raise LmdeployError("logprob_start_len requires return_logprob=True.")
            if most != 0:
                raise LmdeployError("logprob_start_len requires max_tokens=0.")
            return JSONResponse(self._scored(ids, start))
        if most == 0:
            raise LmdeployError("The max_tokens 0 must be a positive integer.")
        answer = await self._answer(request, body, ids, most, seed=None, stop_ids=body.get("stop_token_ids") or [])
        pairs = _pairs(answer) if body.get("return_logprob") else None
        meta = {
            "prompt_tokens": len(ids),
            "completion_tokens": len(answer.token_ids),
            "finish_reason": {"type": answer.finish},
            "output_token_logprobs": pairs or None,
            "input_token_logprobs": None,
            "output_top_logprobs": None,
            "input_top_logprobs": None,
            "routed_experts": None,
        }
        text = self.engine.text(answer.token_ids, special=not body.get("skip_special_tokens", True))
        reply = {"text": text, "output_ids": answer.token_ids, "meta_info": meta}
        return JSONResponse(self._replayed(reply))

    async def chat(self, request: Request) -> Response:
        body = await _json(request)
        if body.get("model") != self.name:
            raise LmdeployError(f"The model {body.get('model')!r} does not exist.", 404)
        if body.get("messages") is None:
            raise LmdeployError("messages: Field required", 422)
        if body["messages"]:
            raise LmdeployError("only empty messages with input_ids here: the server of the tests has no template")
        ids = self._ids(body)
        self._check_logprobs(body)
        most = body.get("max_completion_tokens") or body.get("max_tokens") or self.engine.context
        seed = body.get("seed")
        answer = await self._answer(request, body, ids, most, seed=None if seed is None else seed % 2**32, stop_ids=[])
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": self.engine.text(answer.token_ids, special=False)},
            "logprobs": None,
            "output_token_logprobs": _pairs(answer) or None if body.get("return_logprob") else None,
            "finish_reason": answer.finish,
            "output_ids": answer.token_ids if body.get("return_token_ids") else None,
            "routed_experts": None,
        }
        drawn = len(answer.token_ids)
        usage = {"prompt_tokens": len(ids), "completion_tokens": drawn, "total_tokens": len(ids) + drawn}
        reply = {"id": str(time.monotonic_ns()), "object": "chat.completion", "created": int(time.time())}
        reply |= {"model": self.name, "choices": [choice], "usage": usage}
        return JSONResponse(self._replayed(reply))

    def _ids(self, body: dict[str, Any]) -> list[int]:
        ids = body.get("input_ids")
        if ids is None:
            raise LmdeployError("You must specify exactly one of prompt or input_ids: only input_ids here")
        if not ids:
            raise LmdeployError("The input_ids must not be an empty list")
        if len(ids) >= self.engine.context:
            raise LmdeployError(
                f"Input length ({len(ids)}) must be smaller than the model context length ({self.engine.context})."
            )
        return list(ids)

    def _check_logprobs(self, body: dict[str, Any]) -> None:
        if self.flags.logprobs_mode is None and (wanted := body.get("return_logprob")):
            raise LmdeployError(
                f"return_logprob({wanted}) requested but not enabled logprobs_mode in engine configuration."
            )

    def _scored(self, ids: list[int], start: int) -> dict[str, Any]:
        scores = self.engine.model.scores(ids).tolist() if len(ids) > 1 else []
        pairs = [[score, token] for score, token in zip(scores, ids[1:], strict=True)][start:]
        meta = {"prompt_tokens": len(ids), "completion_tokens": 0, "finish_reason": {"type": "length"}}
        meta |= {"output_token_logprobs": None, "input_token_logprobs": pairs}
        return {"text": "", "output_ids": [], "meta_info": meta}

    async def _answer(
        self,
        request: Request,
        body: dict[str, Any],
        ids: list[int],
        most: int,
        *,
        seed: int | None,
        stop_ids: list[int],
    ) -> Answer:
        inner = self._open(body.get("session_id", -1))
        rid = str(inner)
        try:
            draw = self._draw(body, most, seed, stop_ids)
            answer = await server.unless_gone(request, self.engine, rid, self.engine.answer(rid, ids, draw))
        finally:
            self._inner.pop(inner, None)
        if answer.finish == "stop" and not body.get("include_stop_str_in_output"):
            answer.token_ids, answer.logprobs = answer.token_ids[:-1], answer.logprobs[: len(answer.token_ids) - 1]
        if any(math.isnan(each) for each in answer.logprobs) and body.get("return_logprob"):
            raise LmdeployError("Internal Server Error: out of range float values are not JSON compliant", 500)
        return answer

    def _open(self, session: int | None) -> int:
        """The engine's number for a client's session."""
        if session is not None and session in self._inner:
            raise LmdeployError(f"The session_id {session!r} is occupied.")
        known = None if session in (None, -1) else session
        if known is not None and known in self._inner.values():
            raise LmdeployError(f"User session id {session} already exists", 500)
        inner = next(self._numbers)
        self._inner[inner] = known
        return inner

    def _draw(self, body: dict[str, Any], most: int, seed: int | None, stop_ids: list[int]) -> Draw:
        def given(name: str, default: float) -> float:
            return default if body.get(name) is None else body[name]

        temperature, top_p, top_k = given("temperature", TEMPERATURE), given("top_p", 1.0), given("top_k", TOP_K)
        if not 0 <= temperature <= 2:
            raise LmdeployError(f"The temperature {temperature!r} must be in [0, 2]")
        if not 0 < top_p <= 1:
            raise LmdeployError(f"The top_p {top_p!r} must be in (0, 1].")
        if top_k < 0:
            raise LmdeployError(f"The top_k {top_k!r} cannot be a negative integer.")
        ends = frozenset(stop_ids) | frozenset(self.engine.model.eos)
        ignore, stops = bool(body.get("ignore_eos")), body.get("stop") or []
        return Draw(
            max_tokens=most,
            temperature=temperature,
            top_p=top_p,
            top_k=int(top_k),
            min_p=given("min_p", 0.0),
            seed=seed,
            eos=frozenset() if ignore else ends,
            banned=ends if ignore else frozenset(),
            stop_texts=(stops,) if isinstance(stops, str) else tuple(stops),
            kind="raw",
        )

    # Aborting, sleeping

    async def abort_request(self, request: Request) -> Response:
        if not self.flags.enable_abort_handling:
            message = "This server does not support abort requests. Enable with --enable-abort-handling flag."
            return PlainTextResponse(message, status_code=501)
        body = await _json(request)
        if body.get("abort_all"):
            self.engine.abort(lambda rid: True)
            return Response(status_code=200)
        session = body.get("session_id", -1)
        inner = next((number for number, known in self._inner.items() if known == session and session != -1), None)
        if inner is None:
            raise LmdeployError(f"Session {session} not found.")
        self.engine.abort(lambda rid: rid == str(inner))
        return Response(status_code=200)

    async def sleep(self, request: Request) -> Response:
        try:
            level = int(request.query_params.get("level", "1"))
        except ValueError:
            raise LmdeployError('The "level" query parameter must be an integer.') from None
        if level not in (1, 2):
            raise LmdeployError('The "level" query parameter must be 1 or 2.')
        self.engine.abort(lambda rid: True)
        await self.engine.idle()
        self.engine.asleep = {"weights", "kv_cache"}
        self.engine.flush()
        return Response(status_code=200)

    async def wakeup(self, request: Request) -> Response:
        self.engine.asleep -= set(request.query_params.getlist("tags") or ("weights", "kv_cache"))
        return Response(status_code=200)

    async def is_sleeping(self, request: Request) -> Response:
        return JSONResponse({"is_sleeping": bool(self.engine.asleep)})

    # Weights

    async def update_weights(self, request: Request) -> Response:
        body = await _json(request)
        if "serialized_named_tensors" not in body:
            raise LmdeployError("serialized_named_tensors: Field required", 422)
        try:
            tensors = named_tensors(body["serialized_named_tensors"], body.get("load_format"))
            self.engine.model.load(tensors, packs=bool(body.get("finished")))
        except LoadFailed as error:
            raise LmdeployError(f"Internal Server Error: {error}", 500) from error
        await asyncio.sleep(0)
        return JSONResponse(None)

    # What it says of itself

    async def health(self, request: Request) -> Response:
        if self.engine.dead:
            return JSONResponse({"status": "unhealthy", "message": "Engine loop stopped."}, status_code=503)
        status = "sleeping" if self.engine.asleep else "healthy"
        return JSONResponse({"status": status, "message": f"Engine is {status}."})

    async def models(self, request: Request) -> Response:
        card = {"id": self.name, "object": "model", "owned_by": "lmdeploy", "root": self.name, "parent": None}
        return JSONResponse({"object": "list", "data": [card]})


def _pairs(answer: Answer) -> list[list[Any]]:
    return [[logprob, token] for logprob, token in zip(answer.logprobs, answer.token_ids, strict=False)]


async def _json(request: Request) -> dict[str, Any]:
    try:
        body = await request.json()
    except ValueError as error:
        raise LmdeployError(f"JSON decode error: {error}", 422) from error
    if not isinstance(body, dict):
        raise LmdeployError("Input should be a valid dictionary", 422)
    return body


async def _error(request: Request, error: Any) -> Response:
    return JSONResponse(error.body, status_code=error.status)


async def _busy(request: Request, error: Exception) -> Response:
    return await _error(request, LmdeployError("The engine is not available.", 503))


async def _dead(request: Request, error: Exception) -> Response:
    return await _error(request, LmdeployError("Internal engine error", 500))


def contract(model: str | Path, flags: Flags | None = None, *traps: str) -> server.Contract:
    """A server, to be run by `server.serving`; without flags, started as an adapter ought to."""
    return Lmdeploy(model, flags or Flags.as_it_should(), list(traps)).contract()


def main() -> None:
    parser = server.parser("lmdeploy")
    parser.add_argument("--session-len", type=int, help="the same as --context")
    parser.add_argument("--logprobs-mode")
    parser.add_argument("--model-name")
    parser.add_argument("--api-keys")
    parser.add_argument("--enable-abort-handling", action="store_true")
    parser.add_argument("--enable-prefix-caching", action="store_true")
    given, _ = parser.parse_known_args()
    flags = Flags(
        session_len=given.session_len or given.context,
        logprobs_mode=given.logprobs_mode,
        enable_abort_handling=given.enable_abort_handling,
        enable_prefix_caching=given.enable_prefix_caching,
        model_name=given.model_name,
        api_key=given.api_keys,
    )
    server.run(contract(given.model, flags, *given.trap), given.host, given.port)


if __name__ == "__main__":
    main()
