"""SGLang's words: the keys it takes, its errors, and how it says what came of a request."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from tests.engines.contract.engine import Answer

SAMPLING = (
    "max_new_tokens", "stop", "stop_token_ids", "stop_regex", "temperature", "top_p", "top_k", "min_p",
    "frequency_penalty", "presence_penalty", "repetition_penalty", "min_new_tokens", "n", "beam_width", "json_schema",
    "regex", "ebnf", "structural_tag", "ignore_eos", "skip_special_tokens", "spaces_between_special_tokens",
    "no_stop_trim", "stream_interval", "logit_bias", "sampling_seed", "custom_params", "watermark",
    "choice",
)  # fmt: skip
"""The keys of `sampling_params` that its schema lets through."""


class SglangError(Exception):
    """An error in SGLang's shape."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status, self.message = status, message


@dataclass(frozen=True)
class Asked:
    """One request of a body."""

    rid: str
    ids: list[int]
    params: dict[str, Any]
    adapter: str | None
    body: dict[str, Any]


def apart(body: dict[str, Any]) -> list[dict[str, Any]]:
    """The requests of a batched body: a value that is a list has one for each."""
    count = len(body["input_ids"])
    return [
        {key: value[at] if isinstance(value, list) and len(value) == count else value for key, value in body.items()}
        for at in range(count)
    ]


def finish_reason(answer: Answer) -> dict[str, Any]:
    if answer.finish == "abort":
        return {"type": "abort", "message": "Aborted", "status_code": None, "err_type": None}
    if answer.finish == "length":
        return {"type": "length", "length": len(answer.token_ids)}
    if answer.finish == "nan":
        return {"type": "stop", "matched": "NaN happened"}
    return {"type": "stop", "matched": answer.token_ids[-1] if answer.stopped_by is None else answer.stopped_by}


async def json_body(request: Request) -> dict[str, Any]:
    if not await request.body():
        return {}
    try:
        body = await request.json()
    except ValueError as error:
        raise SglangError(f"JSON decode error: {error}", 422) from error
    if not isinstance(body, dict):
        raise SglangError("Expected `object`, got `array`", 422)
    return body


async def error_reply(request: Request, error: Any) -> Response:
    return JSONResponse({"error": {"message": error.message}}, status_code=error.status)


async def busy_reply(request: Request, error: Exception) -> Response:
    return await error_reply(request, SglangError("Generation is paused.", 503))


async def dead_reply(request: Request, error: Exception) -> Response:
    return await error_reply(request, SglangError("The scheduler has died.", 500))
