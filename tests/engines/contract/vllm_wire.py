"""vLLM's words: sampling parameters, choices of an answer, errors."""

from __future__ import annotations

import base64
import io
import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from tests.engines.contract.engine import Answer, Draw, Engine

FLOOR = -9999.0


class VllmError(Exception):
    """An error in vLLM's shape."""

    def __init__(
        self, message: str, status: int = 400, kind: str = "BadRequestError", param: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": status}}


@dataclass(frozen=True)
class Sampling:
    """`sampling_params` as the server understands them; keys that it does not know are not looked at."""

    first: Draw
    n: int
    logprobs: int | None
    prompt_logprobs: bool
    routes_start: int = 0

    @staticmethod
    def of(params: Any, engine: Engine, *, max_num_seqs: int, processed: bool) -> Sampling:
        if not isinstance(params, dict):
            raise VllmError("sampling_params: Field required", param="sampling_params")
        temperature, top_p = params.get("temperature", 1.0), params.get("top_p", 1.0)
        if not 0 <= temperature <= 2:
            raise VllmError(f"temperature must be in [0, 2], got {temperature}.", param="temperature")
        if not 0 < top_p <= 1:
            raise VllmError(f"top_p must be in (0, 1], got {top_p}.", param="top_p")
        max_tokens = params.get("max_tokens") or engine.context
        if max_tokens < 1:
            raise VllmError(f"max_tokens must be at least 1, got {max_tokens}.", param="max_tokens")
        n = params.get("n", 1)
        if n > max_num_seqs:
            raise VllmError(f"sampling_params.n must be at most the server's max_num_seqs ({max_num_seqs}), got {n}.")
        stops = params.get("stop") or []
        eos = frozenset() if params.get("ignore_eos") else frozenset(engine.model.eos)
        draw = Draw(
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=max(0, params.get("top_k", 0)),
            min_p=params.get("min_p", 0.0),
            seed=params.get("seed"),
            eos=eos,
            stop_ids=frozenset(params.get("stop_token_ids") or ()),
            stop_texts=(stops,) if isinstance(stops, str) else tuple(stops),
            kind="processed" if processed else "raw",
        )
        scores = params.get("prompt_logprobs") is not None
        return Sampling(draw, n, params.get("logprobs"), scores, params.get("routed_experts_prompt_start", 0))

    def draw(self, child: int) -> Draw:
        """Child i draws with the seed + i, so prompts with neighbouring seeds share answers."""
        seed = None if self.first.seed is None else self.first.seed + child
        return replace(self.first, seed=seed)


def choice(index: int, answer: Answer, sampling: Sampling) -> dict[str, Any]:
    content = [
        {"token_id": token, "logprob": _clamped(logprob), "rank": rank or None, "top_logprobs": []}
        for token, logprob, rank in zip(answer.token_ids, answer.logprobs, answer.ranks, strict=False)
    ]
    return {
        "index": index,
        "finish_reason": answer.finish,
        "stop_reason": answer.stopped_by,
        "token_ids": answer.token_ids,
        "weight_versions": [{"version": name, "start": start, "end": end} for name, start, end in answer.spans],
        "logprobs": None if sampling.logprobs is None else {"content": content},
        "routed_experts": None,
        "sampling_mask": None,
    }


def npy_base64(array: np.ndarray) -> str:
    """As `vllm.utils.serial_utils.numpy2base64`."""
    with io.BytesIO() as buffer:
        np.save(buffer, array, allow_pickle=False)
        return base64.b64encode(buffer.getbuffer()).decode("ascii")


def _clamped(logprob: float) -> float:
    return FLOOR if math.isnan(logprob) else max(logprob, FLOOR)


def usage(prompt: int, answers: list[Answer]) -> dict[str, int]:
    drawn = sum(len(each.token_ids) for each in answers)
    return {"prompt_tokens": prompt, "completion_tokens": drawn, "total_tokens": prompt + drawn}


async def json_body(request: Request) -> dict[str, Any]:
    try:
        body = await request.json()
    except ValueError as error:
        raise VllmError(f"JSON decode error: {error}") from error
    if not isinstance(body, dict):
        raise VllmError("Request body must be a JSON object")
    return body


async def error_reply(request: Request, error: Any) -> Response:
    return JSONResponse(error.body, status_code=error.status)


async def busy_reply(request: Request, error: Exception) -> Response:
    paused = VllmError("Generation is paused. Please retry after it resumes.", 503, "InternalServerError")
    return await error_reply(request, paused)


async def dead_reply(request: Request, error: Exception) -> Response:
    message = "EngineCore encountered an issue. See stack trace (above) for the root cause."
    return await error_reply(request, VllmError(message, 500, "InternalServerError"))
