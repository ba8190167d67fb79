"""vLLM 0.32 and 0.33 on the wire: tokens in and out, and the routes of its development mode.

What it does as vLLM does: refuses the token route without --enable-scale-out; ignores unknown sampling keys; reports
raw log-probs unless told otherwise; keeps the token that ended an answer; reports what the context cut as `length`;
gives child i of n the seed + i; aborts only ids with the prefix `generate-tokens-`; keeps the label of the version
after /collective_rpc; lets requests wait while paused (0.32), or answers 503 (0.33, or the trap `paused_503`); and
when weights are loaded while requests run, loses its worker and never answers.
"""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import dataclass
from operator import methodcaller
from pathlib import Path
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from tests.engines.contract import server
from tests.engines.contract.engine import Answer, Busy, Dead
from tests.engines.contract.model import LoadFailed
from tests.engines.contract.vllm_wire import (
    Sampling,
    VllmError,
    busy_reply,
    choice,
    dead_reply,
    error_reply,
    json_body,
    npy_base64,
    usage,
)
from tests.engines.contract.vllm_workers import EXTENSION, Worker

GENERATE = "/inference/v1/generate"
PREFIX = "generate-tokens-"


@dataclass(frozen=True)
class Flags:
    """How it was started; names are vLLM's, defaults too.

    Attributes:
        dev_mode: VLLM_SERVER_DEV_MODE=1.
        runtime_lora: VLLM_ALLOW_RUNTIME_LORA_UPDATING=1.
        version: "0.33" rejects with 503 while paused by abort or wait.
        return_sampling_mask: tells which tokens were left; every request has to have a temperature and a top_k then.
        enable_return_routed_experts: tells which experts were chosen, of every request.
    """

    enable_scale_out: bool = False
    dev_mode: bool = False
    enable_lora: bool = False
    runtime_lora: bool = False
    logprobs_mode: str = "raw_logprobs"
    max_model_len: int = 512
    max_num_seqs: int = 64
    enable_prefix_caching: bool = True
    served_model_name: str | None = None
    version: str = "0.32"
    tensor_parallel_size: int = 1
    return_sampling_mask: bool = False
    enable_return_routed_experts: bool = False
    dtype: str = "float32"

    @staticmethod
    def as_it_should(**more: Any) -> Flags:
        """Started as an adapter ought to start it; `more` are other flags."""
        return Flags(
            enable_scale_out=True,
            dev_mode=True,
            enable_lora=True,
            runtime_lora=True,
            logprobs_mode="processed_logprobs",
            **more,
        )


class Vllm:
    """The routes over one engine."""

    def __init__(self, model: str | Path, flags: Flags, traps: list[str]) -> None:
        self.flags = flags
        self.engine = server.make_engine(
            model, traps, context=flags.max_model_len, caches=flags.enable_prefix_caching, dtype=flags.dtype
        )
        self.name = flags.served_model_name or str(model)
        self.workers = [Worker(self.engine.model) for _ in range(flags.tensor_parallel_size)]
        self._replayed = server.Replayed(self.engine.traps)
        self.engine.tells_routes = flags.enable_return_routed_experts
        if flags.return_sampling_mask and flags.logprobs_mode != "processed_logprobs":
            raise ValueError("sampling distribution replay requires logprobs_mode='processed_logprobs'")

    def contract(self) -> server.Contract:
        post, get = ["POST"], ["GET"]
        routes = [
            Route("/health", self.health),
            Route("/version", self.version),
            Route("/v1/models", self.models),
            Route(GENERATE, self.generate, methods=post),
        ]
        if self.flags.dev_mode:
            routes += [
                Route("/pause", self.pause, methods=post),
                Route("/resume", self.resume, methods=post),
                Route("/is_paused", self.is_paused, methods=get),
                Route("/abort_requests", self.abort, methods=post),
                Route("/collective_rpc", self.collective_rpc, methods=post),
                Route("/reset_prefix_cache", self.reset_prefix_cache, methods=post),
                Route("/update_weight_version", self.update_weight_version, methods=post),
                Route("/weight_info", self.weight_info, methods=get),
                Route("/sleep", self.sleep, methods=post),
                Route("/wake_up", self.wake_up, methods=post),
                Route("/is_sleeping", self.is_sleeping, methods=get),
                Route("/get_world_size", self.world_size, methods=get),
            ]
        if self.flags.runtime_lora:
            routes += [
                Route("/v1/load_lora_adapter", self.load_lora, methods=post),
                Route("/v1/unload_lora_adapter", self.unload_lora, methods=post),
            ]
        errors = {VllmError: error_reply, Busy: busy_reply, Dead: dead_reply}
        return server.Contract(self.engine, routes, frozenset({GENERATE}), errors=errors)

    # Tokens

    async def generate(self, request: Request) -> Response:
        if not self.flags.enable_scale_out:
            message = "Scale-out endpoints are disabled. Restart vllm serve with --enable-scale-out to enable them."
            raise VllmError(message, 403, "PermissionDeniedError")
        body = await json_body(request)
        ids, adapter = self._prompt(body), self._adapter(body.get("model"))
        sampling = self._sampling(body.get("sampling_params"))
        rid = PREFIX + str(body.get("request_id") or request.headers.get("x-request-id") or time.monotonic_ns())
        work = self._answers(rid, ids, sampling, adapter, body.get("cache_salt"))
        answers = await server.unless_gone(request, self.engine, rid, work)
        scored = None
        if sampling.prompt_logprobs:
            scored = self._prompt_logprobs(ids, adapter)
        reply = {
            "request_id": rid,
            "model": body.get("model") or self.name,
            "created": int(time.time()),
            "usage": usage(len(ids), answers),
            "prompt_logprobs": scored,
            "prompt_token_ids": ids if body.get("return_token_ids") else None,
            "output_mode": "tokens",
            "choices": [self._choice(index, each, sampling) for index, each in enumerate(answers)],
        }
        return JSONResponse(self._replayed(reply))

    def _choice(self, index: int, answer: Answer, sampling: Sampling) -> dict[str, Any]:
        told = choice(index, answer, sampling)
        if "no_sides" in self.engine.traps:
            return told
        if self.flags.return_sampling_mask:
            told["sampling_mask"] = answer.kept
        if answer.routes:
            rows = np.array(answer.routes[sampling.routes_start :], dtype=np.uint8)
            told["routed_experts"] = npy_base64(rows)
        return told

    def _sampling(self, params: Any) -> Sampling:
        if self.flags.return_sampling_mask and isinstance(params, dict):
            if params.get("temperature", 1.0) <= 0:
                raise VllmError("sampling distribution replay requires temperature > 0")
            if params.get("top_k", 0) <= 0:
                raise VllmError("sampling distribution replay requires top_k > 0 to bound sampling mask size")
        processed = self.flags.logprobs_mode == "processed_logprobs"
        return Sampling.of(params, self.engine, max_num_seqs=self.flags.max_num_seqs, processed=processed)

    def _prompt(self, body: dict[str, Any]) -> list[int]:
        ids = body.get("token_ids")
        if not isinstance(ids, list) or not ids or not all(isinstance(each, int) and each >= 0 for each in ids):
            raise VllmError("token_ids: Input should be a valid list of non-negative integers", param="token_ids")
        if max(ids) >= self.engine.model.vocab_size:
            raise VllmError(f"Token id {max(ids)} is out of vocabulary")
        if len(ids) >= self.engine.context:
            raise VllmError(
                f"This model's maximum context length is {self.engine.context} tokens. However, your prompt contains "
                f"{len(ids)} input tokens, which exceeds this limit even without any output tokens. Please reduce the "
                "length of the input prompt.",
                param="input_tokens",
            )
        return ids

    def _adapter(self, model: str | None) -> str | None:
        if not model or model == self.name:
            return None
        if model in self.engine.model.adapters:
            return model
        message = f"The model `{model}` does not exist. Valid aliases: {self.name}."
        raise VllmError(message, 404, "NotFoundError", "model")

    async def _answers(
        self, rid: str, ids: list[int], sampling: Sampling, adapter: str | None, salt: str | None
    ) -> list[Answer]:
        if self.flags.version >= "0.33" and self.engine.paused in ("abort", "wait"):
            raise Busy
        draws = [sampling.draw(child) for child in range(sampling.n)]
        asked = (self.engine.answer(rid, ids, each, adapter=adapter, salt=salt) for each in draws)
        return await asyncio.gather(*asked)

    def _prompt_logprobs(self, ids: list[int], adapter: str | None) -> list[Any]:
        scores = self.engine.model.scores(ids, adapter) if len(ids) > 1 else []
        known = [
            {str(token): {"logprob": float(score), "rank": 1, "decoded_token": None}}
            for token, score in zip(ids[1:], scores, strict=True)
        ]
        return [None, *known]

    # Pausing, sleeping, aborting

    async def pause(self, request: Request) -> Response:
        mode = request.query_params.get("mode", "abort")
        if mode not in ("abort", "wait", "keep"):
            raise VllmError(f"mode: Input should be 'abort', 'wait' or 'keep', got {mode!r}")
        if mode == "abort":
            self.engine.abort(lambda rid: True)
        if mode != "keep":
            await self.engine.idle()
        self.engine.paused = mode
        if mode != "keep" and request.query_params.get("clear_cache", "true") == "true":
            self.engine.flush()
        return JSONResponse({"status": "paused"})

    async def resume(self, request: Request) -> Response:
        self.engine.paused = None
        return JSONResponse({"status": "resumed"})

    async def is_paused(self, request: Request) -> Response:
        return JSONResponse({"is_paused": self.engine.paused is not None})

    async def abort(self, request: Request) -> Response:
        wanted = (await json_body(request)).get("request_ids")
        if wanted:
            self.engine.abort(lambda rid: rid in wanted)
        else:
            wanted = self.engine.running
            self.engine.abort(lambda rid: True)
        return JSONResponse({"status": "aborted", "aborted": len(wanted)})

    async def sleep(self, request: Request) -> Response:
        level = int(request.query_params.get("level", "1"))
        self.engine.abort(lambda rid: True)
        self.engine.asleep = {"weights", "kv_cache"}
        return JSONResponse({"status": "sleeping", "level": level})

    async def wake_up(self, request: Request) -> Response:
        tags = request.query_params.getlist("tags") or None
        self.engine.asleep -= set(tags or ("weights", "kv_cache"))
        return JSONResponse({"status": "sleeping" if self.engine.asleep else "awake", "tags": tags})

    async def is_sleeping(self, request: Request) -> Response:
        return JSONResponse({"is_sleeping": bool(self.engine.asleep)})

    # Weights

    async def collective_rpc(self, request: Request) -> Response:
        body = await json_body(request)
        if (method := body.get("method")) is None:
            raise VllmError("Missing 'method' in request body")
        if method not in EXTENSION:
            raise VllmError(
                f"Call to collective_rpc method failed: no attribute {method!r}", 500, "InternalServerError"
            )
        if self.engine.running and not self.engine.paused:
            self.engine.die()
            await asyncio.Event().wait()
        call = methodcaller(method, *body.get("args", []), **body.get("kwargs", {}))
        try:
            results = await asyncio.gather(*(asyncio.to_thread(call, worker) for worker in self.workers))
        except (LoadFailed, TypeError) as error:
            raise VllmError(str(error), 500, "InternalServerError") from error
        return JSONResponse({"results": results})

    async def reset_prefix_cache(self, request: Request) -> Response:
        running = request.query_params.get("reset_running_requests", "false") == "true"
        return JSONResponse({"success": self.engine.flush(running=running)})

    async def update_weight_version(self, request: Request) -> Response:
        version = (await json_body(request)).get("new_version")
        if not isinstance(version, str):
            raise VllmError("new_version: Input should be a valid string", 400)
        self.engine.set_version(version)
        return JSONResponse({"success": True, "new_version": version})

    async def weight_info(self, request: Request) -> Response:
        if self.engine.dead:
            raise Dead
        return JSONResponse({"weight_version": self.engine.version})

    async def load_lora(self, request: Request) -> Response:
        body = await json_body(request)
        name, path = body.get("lora_name"), body.get("lora_path")
        if not name or not path:
            raise VllmError("Both 'lora_name' and 'lora_path' must be provided.", 400, "InvalidUserInput")
        if name in self.engine.model.adapters and not body.get("load_inplace"):
            message = (
                f"The lora adapter '{name}' has already been loaded. If you want to load the adapter in place, set "
                "'load_inplace' to True."
            )
            raise VllmError(message, 400, "InvalidUserInput")
        if not self.flags.enable_lora:
            raise VllmError("LoRA is not enabled. Use --enable-lora to enable LoRA.", 500, "InternalServerError")
        try:
            self.engine.model.add_adapter(name, path)
        except LoadFailed as error:
            raise VllmError(str(error), 404, "NotFoundError") from error
        return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")

    async def unload_lora(self, request: Request) -> Response:
        name = (await json_body(request)).get("lora_name")
        if name not in self.engine.model.adapters:
            raise VllmError(f"The lora adapter '{name}' cannot be found.", 404, "NotFoundError")
        self.engine.model.remove_adapter(name)
        return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")

    # What it says of itself

    async def health(self, request: Request) -> Response:
        return Response(status_code=503 if self.engine.dead else 200)

    async def version(self, request: Request) -> Response:
        return JSONResponse({"version": f"{self.flags.version}.0"})

    async def world_size(self, request: Request) -> Response:
        return JSONResponse({"world_size": self.flags.tensor_parallel_size})

    async def models(self, request: Request) -> Response:
        base = {"id": self.name, "object": "model", "owned_by": "vllm", "root": str(self.engine.model.folder)}
        cards = [base | {"parent": None, "max_model_len": self.engine.context}]
        cards += [
            base | {"id": name, "root": adapter.path, "parent": self.name, "max_model_len": None}
            for name, adapter in self.engine.model.adapters.items()
        ]
        return JSONResponse({"object": "list", "data": cards})


def contract(model: str | Path, flags: Flags | None = None, *traps: str) -> server.Contract:
    """A server, to be run by `server.serving`; without flags, started as an adapter ought to."""
    return Vllm(model, flags or Flags.as_it_should(), list(traps)).contract()


def main() -> None:
    parser = server.parser("vllm")
    parser.add_argument("--max-model-len", type=int, help="the same as --context")
    parser.add_argument("--served-model-name")
    parser.add_argument("--logprobs-mode", default="raw_logprobs")
    parser.add_argument("--max-num-seqs", type=int, default=64)
    parser.add_argument("--engine-version", default="0.32", choices=["0.32", "0.33"])
    parser.add_argument("--enable-scale-out", action="store_true")
    parser.add_argument("--enable-lora", action="store_true")
    parser.add_argument("--no-enable-prefix-caching", action="store_true")
    parser.add_argument("--return-sampling-mask", action="store_true")
    parser.add_argument("--enable-return-routed-experts", action="store_true")
    given, _ = parser.parse_known_args()
    flags = Flags(
        enable_scale_out=given.enable_scale_out,
        dev_mode=os.environ.get("VLLM_SERVER_DEV_MODE") == "1",
        enable_lora=given.enable_lora,
        runtime_lora=os.environ.get("VLLM_ALLOW_RUNTIME_LORA_UPDATING") in ("1", "True", "true"),
        logprobs_mode=given.logprobs_mode,
        max_model_len=given.max_model_len or given.context,
        max_num_seqs=given.max_num_seqs,
        enable_prefix_caching=not given.no_enable_prefix_caching,
        served_model_name=given.served_model_name,
        version=given.engine_version,
        return_sampling_mask=given.return_sampling_mask,
        enable_return_routed_experts=given.enable_return_routed_experts,
    )
    server.run(contract(given.model, flags, *given.trap), given.host, given.port)


if __name__ == "__main__":
    main()
