"""A server that speaks OpenAI's `/v1/completions` and `/v1/chat/completions`, and of tokens as much as it is told to.

With `token_ids` it answers `return_token_ids` as vLLM does (`token_ids` and `prompt_token_ids` of a choice); with
`token_id_strings` it answers `return_tokens_as_token_ids` by naming a token `token_id:505` in the log-probs; without
either it ignores these keys, as most servers do, and gives texts alone. There is no route for weights and none to
abort: a client that goes away ends its request.
"""

from __future__ import annotations

import asyncio
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tests.engines.contract import server
from tests.engines.contract.engine import Answer, Busy, Dead, Draw

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
FLOOR = -9999.0


@dataclass(frozen=True)
class Flags:
    """What the server can do.

    Attributes:
        token_ids: it knows `return_token_ids`.
        token_id_strings: it knows `return_tokens_as_token_ids`.
        api_key: without it, 401.
    """

    token_ids: bool = True
    token_id_strings: bool = True
    api_key: str | None = None
    context: int = 512
    model_name: str | None = None


class OpenaiError(Exception):
    """An error in OpenAI's shape."""

    def __init__(self, message: str, status: int = 400, kind: str = "invalid_request_error") -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": None, "code": None}}


class Openai:
    """The routes over one engine."""

    def __init__(self, model: str | Path, flags: Flags, traps: list[str]) -> None:
        self.flags = flags
        self.engine = server.make_engine(model, traps, context=flags.context, caches=True)
        self.name = flags.model_name or str(model)
        self._replayed = server.Replayed(self.engine.traps)

    def contract(self) -> server.Contract:
        routes = [
            Route("/health", self.health),
            Route("/v1/models", self.models),
            Route(COMPLETIONS, self.completions, methods=["POST"]),
            Route(CHAT, self.chat, methods=["POST"]),
        ]
        errors = {OpenaiError: _error, Busy: _busy, Dead: _dead}
        return server.Contract(self.engine, routes, frozenset({COMPLETIONS, CHAT}), errors=errors)

    async def completions(self, request: Request) -> Response:
        body = await self._body(request)
        ids = self._ids(body.get("prompt"))
        answers = await self._answers(request, body, ids, most=body.get("max_tokens", 16))
        choices = []
        for index, answer in enumerate(answers):
            choice = self._choice(index, answer, body, ids) | {
                "text": self.engine.text(answer.token_ids, special=False)
            }
            wanted = body.get("logprobs") is not None
            choices.append(choice | {"logprobs": self._completion_logprobs(answer, body) if wanted else None})
        return self._reply("text_completion", choices, ids, answers)

    async def chat(self, request: Request) -> Response:
        body = await self._body(request)
        ids = self._rendered(body.get("messages"))
        most = body.get("max_completion_tokens") or body.get("max_tokens") or self.engine.context
        answers = await self._answers(request, body, ids, most=most)
        choices = []
        for index, answer in enumerate(answers):
            content = {"role": "assistant", "content": self.engine.text(answer.token_ids, special=False)}
            logprobs = {"content": self._chat_logprobs(answer, body)} if body.get("logprobs") else None
            choices.append(self._choice(index, answer, body, ids) | {"message": content, "logprobs": logprobs})
        return self._reply("chat.completion", choices, ids, answers)

    def _reply(self, kind: str, choices: list[Any], ids: list[int], answers: list[Answer]) -> Response:
        drawn = sum(len(each.token_ids) for each in answers)
        usage = {"prompt_tokens": len(ids), "completion_tokens": drawn, "total_tokens": len(ids) + drawn}
        head = {"id": f"cmpl-{time.monotonic_ns()}", "object": kind, "created": int(time.time()), "model": self.name}
        return JSONResponse(self._replayed(head | {"choices": choices, "usage": usage}))

    def _choice(self, index: int, answer: Answer, body: dict[str, Any], ids: list[int]) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": index, "finish_reason": answer.finish, "stop_reason": answer.stopped_by}
        if self.flags.token_ids and body.get("return_token_ids"):
            choice |= {"token_ids": answer.token_ids, "prompt_token_ids": ids}
        return choice

    def _completion_logprobs(self, answer: Answer, body: dict[str, Any]) -> dict[str, Any]:
        tokens = self._named(answer, body)
        offsets = [sum(len(each) for each in tokens[:at]) for at in range(len(tokens))]
        values = [_clamped(each) for each in answer.logprobs]
        return {"tokens": tokens, "token_logprobs": values, "top_logprobs": None, "text_offset": offsets}

    def _chat_logprobs(self, answer: Answer, body: dict[str, Any]) -> list[dict[str, Any]]:
        return [
            {"token": token, "logprob": _clamped(logprob), "bytes": list(token.encode()), "top_logprobs": []}
            for token, logprob in zip(self._named(answer, body), answer.logprobs, strict=False)
        ]

    def _named(self, answer: Answer, body: dict[str, Any]) -> list[str]:
        if self.flags.token_id_strings and body.get("return_tokens_as_token_ids"):
            return [f"token_id:{token}" for token in answer.token_ids]
        return [self.engine.text([token]) for token in answer.token_ids]

    # What was asked

    def _check_key(self, request: Request) -> None:
        if self.flags.api_key and request.headers.get("authorization") != f"Bearer {self.flags.api_key}":
            raise OpenaiError("Incorrect API key provided", 401, "authentication_error")

    async def _body(self, request: Request) -> dict[str, Any]:
        self._check_key(request)
        try:
            body = await request.json()
        except ValueError as error:
            raise OpenaiError(f"JSON decode error: {error}") from error
        if not isinstance(body, dict):
            raise OpenaiError("the body must be a JSON object")
        if body.get("model") not in (None, self.name):
            raise OpenaiError(f"The model `{body['model']}` does not exist.", 404, "not_found_error")
        if body.get("stream"):
            raise OpenaiError("no streaming here: the server of the tests answers whole")
        return body

    def _ids(self, prompt: Any) -> list[int]:
        tokenizer = self.engine.model.tokenizer
        if isinstance(prompt, str) and tokenizer is not None:
            return self._fitting(tokenizer.encode(prompt, add_special_tokens=False))
        if isinstance(prompt, list) and prompt and all(isinstance(each, int) for each in prompt):
            return self._fitting(prompt)
        raise OpenaiError("prompt: one text (with a tokenizer) or one list of token ids")

    def _rendered(self, messages: Any) -> list[int]:
        tokenizer = self.engine.model.tokenizer
        if tokenizer is None or not tokenizer.chat_template:
            raise OpenaiError("the model has no chat template")
        if not isinstance(messages, list) or not messages:
            raise OpenaiError("messages: expected at least one")
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return self._ids(text)

    def _fitting(self, ids: list[int]) -> list[int]:
        if len(ids) >= self.engine.context:
            raise OpenaiError(
                f"This model's maximum context length is {self.engine.context} tokens. However, your prompt contains "
                f"{len(ids)} input tokens."
            )
        return list(ids)

    async def _answers(self, request: Request, body: dict[str, Any], ids: list[int], *, most: int) -> list[Answer]:
        stops, seed = body.get("stop") or [], body.get("seed")
        draw = Draw(
            max_tokens=most,
            temperature=body.get("temperature", 1.0),
            top_p=body.get("top_p", 1.0),
            top_k=max(0, body.get("top_k", 0)),
            min_p=body.get("min_p", 0.0),
            eos=frozenset() if body.get("ignore_eos") else frozenset(self.engine.model.eos),
            stop_ids=frozenset(body.get("stop_token_ids") or ()),
            stop_texts=(stops,) if isinstance(stops, str) else tuple(stops),
            kind="processed",
        )
        rid = f"cmpl-{time.monotonic_ns()}"
        draws = [replace(draw, seed=None if seed is None else seed + child) for child in range(body.get("n") or 1)]
        work = asyncio.gather(*(self.engine.answer(rid, ids, each) for each in draws))
        return await server.unless_gone(request, self.engine, rid, work)

    # What it says of itself

    async def health(self, request: Request) -> Response:
        return Response(status_code=503 if self.engine.dead else 200)

    async def models(self, request: Request) -> Response:
        self._check_key(request)
        card = {"id": self.name, "object": "model", "owned_by": "contract", "created": 0}
        return JSONResponse({"object": "list", "data": [card | {"max_model_len": self.engine.context}]})


def _clamped(logprob: float) -> float:
    return FLOOR if math.isnan(logprob) else max(logprob, FLOOR)


async def _error(request: Request, error: Any) -> Response:
    return JSONResponse(error.body, status_code=error.status)


async def _busy(request: Request, error: Exception) -> Response:
    return await _error(request, OpenaiError("The server is not ready.", 503, "server_error"))


async def _dead(request: Request, error: Exception) -> Response:
    return await _error(request, OpenaiError("Internal server error", 500, "server_error"))


def contract(model: str | Path, flags: Flags | None = None, *traps: str) -> server.Contract:
    """A server, to be run by `server.serving`; without flags, one that gives token ids."""
    return Openai(model, flags or Flags(), list(traps)).contract()


def main() -> None:
    parser = server.parser("openai")
    parser.add_argument("--no-token-ids", action="store_true", help="does not know return_token_ids")
    parser.add_argument("--no-token-id-strings", action="store_true", help="nor return_tokens_as_token_ids")
    parser.add_argument("--api-key")
    parser.add_argument("--model-name")
    given, _ = parser.parse_known_args()
    flags = Flags(
        token_ids=not given.no_token_ids,
        token_id_strings=not given.no_token_id_strings,
        api_key=given.api_key,
        context=given.context,
        model_name=given.model_name,
    )
    server.run(contract(given.model, flags, *given.trap), given.host, given.port)


if __name__ == "__main__":
    main()
