"""SGLang's words: the keys it takes, its errors, and how it says what came of a request."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Any

import numpy as np
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


def check_mask(body: dict[str, Any], *, most: int, seeded: bool) -> None:
    """SGLang ends such a request with `abort`, and answers it with this status."""
    params = body.get("sampling_params") or {}
    top_k = params.get("top_k", -1)
    if body.get("return_sampling_mask") and top_k != 1 and not 1 < top_k <= most:
        raise SglangError(
            f"return_sampling_mask requires top_k=1 for greedy sampling or finite 1 < top_k <= {most}; got "
            f"top_k={top_k}. Lower top_k or increase --sampling-mask-max-tokens."
        )
    if params.get("min_p") and seeded:
        raise SglangError("With sampling seed, multinomial_with_seed will provide wrong results", 500)


def told(asked: Asked, answer: Answer) -> dict[str, Any]:
    """What is asked for beside tokens; experts as int32 without a shape, all layers of the model among them."""
    found: dict[str, Any] = {}
    if asked.body.get("return_sampling_mask"):
        found["output_token_sampling_mask"] = answer.kept
        found["output_token_sampling_logprobs"] = answer.drawn_logprobs
        found["output_token_sampling_mask_length"] = len(answer.kept)
    if asked.body.get("return_routed_experts") and answer.routes:
        rows = np.array(answer.routes[asked.body.get("routed_experts_start_len", 0) :], dtype=np.int32)
        found["routed_experts"] = base64.b64encode(rows.tobytes()).decode("utf-8")
    return found


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


@dataclass(frozen=True)
class Flags:
    """How it was started; names are SGLang's, defaults too.

    Attributes:
        health_check_timeout: SGLANG_HEALTH_CHECK_TIMEOUT, in seconds.
    """

    context_length: int = 512
    enable_deterministic_inference: bool = False
    enable_lora: bool = False
    enable_memory_saver: bool = False
    allow_auto_truncate: bool = False
    disable_radix_cache: bool = False
    health_check_timeout: float = 20.0
    enable_return_routed_experts: bool = False
    sampling_mask_max_tokens: int = 4096

    @staticmethod
    def as_it_should(**more: Any) -> Flags:
        """Started as an adapter ought to start it; `more` are other flags."""
        return Flags(enable_deterministic_inference=True, enable_lora=True, enable_memory_saver=True, **more)
