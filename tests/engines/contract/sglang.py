"""SGLang 0.5.23 on the wire: `/generate` by token ids, weights from a folder, pauses of three kinds.

What it does as SGLang does: refuses sampling keys that it does not know and ignores others; draws without a seed unless
started with --enable-deterministic-inference, and with seed 42 where none is given then; reports log-probs of
logits / temperature, before top_p and top_k; lets `ignore_eos` switch off `stop_token_ids` too; hides NaN behind a stop
called "NaN happened"; aborts every request whose id begins with that of one it knows; answers 400 to an update whose
cache it could not flush, though the weights have changed; lets requests wait while it is paused, the one token that
/health draws among them, so that a pause looks unhealthy in the end.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from tests.engines.contract import server
from tests.engines.contract.engine import Answer, Busy, Dead, Draw
from tests.engines.contract.model import LoadFailed
from tests.engines.contract.sglang_distributed import Distributed
from tests.engines.contract.sglang_wire import (
    SAMPLING,
    Asked,
    Flags,
    SglangError,
    apart,
    busy_reply,
    check_mask,
    dead_reply,
    error_reply,
    finish_reason,
    json_body,
    told,
)


class Sglang:
    """The routes over one engine."""

    def __init__(self, model: str | Path, flags: Flags, traps: list[str]) -> None:
        self.flags = flags
        caches = not flags.disable_radix_cache
        self.engine = server.make_engine(model, traps, context=flags.context_length, caches=caches)
        self.model_path = str(model)
        self.weight_version = "default"
        """What /model_info says; spans have the engine's own."""
        self._replayed = server.Replayed(self.engine.traps)
        self._distributed = Distributed(self.engine, updated=self._named, flushed=self._flushed)
        self.engine.tells_routes = flags.enable_return_routed_experts

    def contract(self) -> server.Contract:
        both, post = ["GET", "POST"], ["POST"]
        routes = [
            Route("/health", self.health),
            Route("/health_generate", self.health),
            Route("/model_info", self.model_info),
            Route("/get_model_info", self.model_info),
            Route("/server_info", self.server_info),
            Route("/get_server_info", self.server_info),
            Route("/v1/models", self.models),
            Route("/generate", self.generate, methods=["POST", "PUT"]),
            Route("/update_weights_from_disk", self.update_weights_from_disk, methods=post),
            Route("/update_weight_version", self.update_weight_version, methods=post),
            Route("/pause_generation", self.pause_generation, methods=post),
            Route("/continue_generation", self.continue_generation, methods=post),
            Route("/abort_request", self.abort_request, methods=post),
            Route("/flush_cache", self.flush_cache, methods=both),
            Route("/release_memory_occupation", self.release_memory, methods=both),
            Route("/resume_memory_occupation", self.resume_memory, methods=both),
            Route("/load_lora_adapter", self.load_lora, methods=post),
            Route("/unload_lora_adapter", self.unload_lora, methods=post),
        ]
        routes += self._distributed.routes()
        errors = {SglangError: error_reply, Busy: busy_reply, Dead: dead_reply}
        # Its health draws a token, so it hangs with the rest.
        return server.Contract(self.engine, routes, frozenset({"/generate"}), frozenset(), errors=errors)

    # Tokens

    async def generate(self, request: Request) -> Response:
        body = await json_body(request)
        if "input_ids" not in body:
            raise SglangError("either text, input_ids or input_embeds should be provided: only input_ids here")
        single = not (body["input_ids"] and isinstance(body["input_ids"][0], list))
        asked = [self._asked(each) for each in ([body] if single else apart(body))]
        work = asyncio.gather(*(self._reply(each, request) for each in asked))
        replies = [reply for replies in await work for reply in replies]
        reply = replies[0] if single and len(replies) == 1 else replies
        return JSONResponse(self._replayed(reply))

    def _asked(self, body: dict[str, Any]) -> Asked:
        params = body.get("sampling_params") or {}
        for key in params:
            if key not in SAMPLING:
                listed = ", ".join(f"`{each}`" for each in SAMPLING)
                raise SglangError(f"unknown field `{key}`, expected one of {listed}")
        ids, most = list(body["input_ids"]), params.get("max_new_tokens", 128)
        context = self.engine.context
        if len(ids) >= context:
            message = f"The input ({len(ids)} tokens) is longer than the model's context length ({context} tokens)."
            raise SglangError(message)
        if (
            len(ids) + most > context
            and not self.flags.allow_auto_truncate
            and "short_context" not in self.engine.traps
        ):
            raise SglangError(
                f"Requested token count exceeds the model's maximum context length of {context} tokens. You requested "
                f"a total of {len(ids) + most} tokens: {len(ids)} tokens from the input messages and {most} tokens for "
                "the completion. Please reduce the number of tokens in the input messages or the completion to fit "
                "within the limit."
            )
        check_mask(body, most=self.flags.sampling_mask_max_tokens, seeded=self.flags.enable_deterministic_inference)
        adapter = body.get("lora_path")
        if adapter is not None and adapter not in self.engine.model.adapters:
            raise SglangError(f"Got LoRA adapter that has never been loaded: {adapter}")
        return Asked(body.get("rid") or f"{time.monotonic_ns():032x}", ids, params, adapter, body)

    async def _reply(self, asked: Asked, request: Request) -> list[dict[str, Any]]:
        started = time.monotonic()
        draw = self._draw(asked.params)
        count = asked.params.get("n", 1)
        rids = [asked.rid if count == 1 else f"{asked.rid}_{index}" for index in range(count)]
        answers = (
            self.engine.answer(rid, asked.ids, draw, adapter=asked.adapter, salt=asked.body.get("cache_salt"))
            for rid in rids
        )
        done = await server.unless_gone(request, self.engine, asked.rid, asyncio.gather(*answers))
        return [self._one(rid, asked, answer, started) for rid, answer in zip(rids, done, strict=True)]

    def _draw(self, params: dict[str, Any]) -> Draw:
        ignore = bool(params.get("ignore_eos"))
        stops = params.get("stop") or []
        seed = params.get("sampling_seed", 42) if self.flags.enable_deterministic_inference else None
        temperature = params.get("temperature", 1.0)
        top_k = params.get("top_k", -1)
        return Draw(
            max_tokens=params.get("max_new_tokens", 128),
            temperature=temperature,
            top_p=params.get("top_p", 1.0),
            top_k=1 if temperature < 1e-6 else max(0, top_k),
            min_p=params.get("min_p", 0.0),
            seed=seed,
            eos=frozenset() if ignore else frozenset(self.engine.model.eos),
            stop_ids=frozenset() if ignore else frozenset(params.get("stop_token_ids") or ()),
            stop_texts=(stops,) if isinstance(stops, str) else tuple(stops),
            kind="temperature",
            nan_ends=True,
        )

    def _one(self, rid: str, asked: Asked, answer: Answer, started: float) -> dict[str, Any]:
        if answer.finish == "nan":
            # The id that a NaN was drawn as is no token, and is written over with one that ends an answer.
            ends = [*self.engine.model.eos, *asked.params.get("stop_token_ids", ()), 0]
            answer.token_ids[-1] = ends[0]
        meta: dict[str, Any] = {
            "id": rid,
            "finish_reason": finish_reason(answer),
            "prompt_tokens": len(asked.ids),
            "completion_tokens": len(answer.token_ids),
            "cached_tokens": answer.cached,
            "weight_version": self.engine.version,
            "weight_versions": [{"version": name, "start": start, "end": end} for name, start, end in answer.spans],
            "e2e_latency": time.monotonic() - started,
        }
        if asked.body.get("return_logprob"):
            pairs = zip(answer.logprobs, answer.token_ids, strict=False)
            meta["output_token_logprobs"] = [[None if math.isnan(each) else each, token, None] for each, token in pairs]
            meta["output_token_logprobs_length"] = len(answer.logprobs)
            meta["input_token_logprobs"] = self._input_logprobs(asked)
        if "no_sides" not in self.engine.traps:
            meta |= told(asked, answer)
        skip = asked.params.get("skip_special_tokens", True)
        text = self.engine.text(answer.token_ids, special=not skip)
        return {"text": text, "output_ids": answer.token_ids, "meta_info": meta}

    def _input_logprobs(self, asked: Asked) -> list[list[Any]]:
        start = asked.body.get("logprob_start_len", -1)
        if start is None or start < 0:
            return []
        scores: Iterable[float] = self.engine.model.scores(asked.ids, asked.adapter).tolist() if asked.ids[1:] else ()
        known = [[None, asked.ids[0], None]]
        known += [[score, token, None] for score, token in zip(scores, asked.ids[1:], strict=True)]
        return known[start:]

    # Pausing, sleeping, aborting

    async def pause_generation(self, request: Request) -> Response:
        mode = (await json_body(request)).get("mode", "abort")
        if mode not in ("abort", "retract", "in_place"):
            raise SglangError(f"mode: Input should be 'abort', 'retract' or 'in_place', got {mode!r}", 422)
        self.engine.paused = mode
        if mode == "abort":
            self.engine.abort(lambda rid: True)
            if "lost_abort" not in self.engine.traps:
                await self.engine.idle()
        return JSONResponse({"message": "Generation paused successfully.", "status": "ok"})

    async def continue_generation(self, request: Request) -> Response:
        await json_body(request)
        self.engine.paused = None
        return JSONResponse({"message": "Generation continued successfully.", "status": "ok"})

    async def abort_request(self, request: Request) -> Response:
        body = await json_body(request)
        rid = body.get("rid") or ""
        if body.get("abort_all"):
            self.engine.abort(lambda each: True)
        elif rid in self.engine.running:
            # An id that is not known is dropped here; one that is ends all that begin with it.
            self.engine.abort(lambda each: each.startswith(rid))
        return Response(status_code=200)

    async def flush_cache(self, request: Request) -> Response:
        if self._flushed():
            return PlainTextResponse("Cache flushed.\nPlease check backend logs for more details. ")
        return PlainTextResponse("Flush cache failed.\n", status_code=400)

    def _flushed(self) -> bool:
        """Requests that were retracted are computed again; others are in the way."""
        return self.engine.flush(running=self.engine.paused == "retract")

    async def release_memory(self, request: Request) -> Response:
        self._saving()
        if self.engine.running:
            raise SglangError("release_memory_occupation should be called only when server is idle.", 500)
        self.engine.asleep |= set((await json_body(request)).get("tags") or ("weights", "kv_cache", "cuda_graph"))
        self.engine.flush()
        return JSONResponse(None)

    async def resume_memory(self, request: Request) -> Response:
        self._saving()
        self.engine.asleep -= set((await json_body(request)).get("tags") or ("weights", "kv_cache", "cuda_graph"))
        return JSONResponse(None)

    def _saving(self) -> None:
        if not self.flags.enable_memory_saver:
            raise SglangError("memory saver is not enabled: start the server with --enable-memory-saver", 500)

    # Weights

    async def update_weights_from_disk(self, request: Request) -> Response:
        body = await json_body(request)
        if "model_path" not in body:
            raise SglangError("Object missing required field `model_path`", 422)
        if body.get("abort_all_requests"):
            self.engine.abort(lambda rid: True)
        if not self.engine.paused:
            await self.engine.idle()
        version = body.get("weight_version")
        success, message = self._updated(body["model_path"], version, flush=body.get("flush_cache", True))
        if success and version is not None:
            if "stale_version" not in self.engine.traps:
                self.weight_version = version
            message += f" Weight version updated to {version}."
        reply = {"success": success, "message": message, "num_paused_requests": 0}
        return JSONResponse(reply, status_code=200 if success else 400)

    def _updated(self, path: str, version: str | None, *, flush: bool) -> tuple[bool, str]:
        self.model_path = path
        try:
            self.engine.load(path)
        except LoadFailed as error:
            return False, f"Failed to update weights: {error}.\nRolling back to original weights."
        if version is not None:
            self.engine.set_version(version)
        if flush and not self._flushed():
            return False, (
                "Weights were updated, but the cache was not flushed because requests are still running or queued. "
                "Retract or finish them, then call /flush_cache."
            )
        return True, "Succeeded to update model weights."

    def _named(self, version: str) -> None:
        self.engine.set_version(version)
        if "stale_version" not in self.engine.traps:
            self.weight_version = version

    async def update_weight_version(self, request: Request) -> Response:
        version = (await json_body(request))["new_version"]
        self._named(version)
        message = f"Weight version updated to {version}"
        return JSONResponse({"success": True, "message": message, "new_version": version})

    async def load_lora(self, request: Request) -> Response:
        body = await json_body(request)
        name, error = body["lora_name"], None
        if not self.flags.enable_lora:
            error = "LoRA is not enabled. Please set `--enable-lora` to enable LoRA."
        elif name in self.engine.model.adapters:
            error = f"Failed to load LoRA adapter {name}: it is already loaded"
        else:
            try:
                self.engine.model.add_adapter(name, body["lora_path"])
            except LoadFailed as failed:
                error = f"Failed to load LoRA adapter {name}: {failed}"
        return self._lora_reply(error)

    async def unload_lora(self, request: Request) -> Response:
        name, error = (await json_body(request))["lora_name"], None
        if name in self.engine.model.adapters:
            self.engine.model.remove_adapter(name)
        else:
            error = f"LoRA adapter with name {name} does not exist. Loaded LoRA adapters: "
            error += str(list(self.engine.model.adapters))
        return self._lora_reply(error)

    def _lora_reply(self, error: str | None) -> Response:
        loaded = {name: adapter.path for name, adapter in self.engine.model.adapters.items()}
        reply = {"success": error is None, "error_message": error, "loaded_adapters": loaded}
        return JSONResponse(reply, status_code=400 if error else 200)

    # What it says of itself

    async def health(self, request: Request) -> Response:
        """Draws one token, so a paused server is not healthy after a while."""
        ids, draw = [0], Draw(max_tokens=1, temperature=0.0)
        try:
            async with asyncio.timeout(self.flags.health_check_timeout):
                await self.engine.answer(f"HEALTH_CHECK_{time.monotonic_ns()}", ids, draw)
        except (TimeoutError, Busy, Dead):
            return Response(status_code=503)
        return Response(status_code=200)

    async def model_info(self, request: Request) -> Response:
        return JSONResponse(
            {
                "model_path": self.model_path,
                "served_model_name": str(self.engine.model.folder),
                "tokenizer_path": str(self.engine.model.folder),
                "is_generation": True,
                "preferred_sampling_params": None,
                "weight_version": self.weight_version,
                "load_format": "auto",
                "model_type": "qwen3",
            }
        )

    async def server_info(self, request: Request) -> Response:
        facts: dict[str, Any] = {"version": "0.5.23", "model_path": str(self.engine.model.folder), "frontend": "python"}
        return JSONResponse(facts | vars(self.flags) | {"internal_states": [{}], "tp_size": 1})

    async def models(self, request: Request) -> Response:
        name = str(self.engine.model.folder)
        card = {"id": name, "object": "model", "owned_by": "sglang", "root": name, "max_model_len": self.engine.context}
        return JSONResponse({"object": "list", "data": [card]})


def contract(model: str | Path, flags: Flags | None = None, *traps: str) -> server.Contract:
    """A server, to be run by `server.serving`; without flags, started as an adapter ought to."""
    return Sglang(model, flags or Flags.as_it_should(), list(traps)).contract()


def main() -> None:
    parser = server.parser("sglang", "--model-path")
    parser.add_argument("--context-length", type=int, help="the same as --context")
    parser.add_argument("--sampling-mask-max-tokens", type=int, default=4096)
    parser.add_argument("--enable-return-routed-experts", action="store_true")
    for name in ("enable-deterministic-inference", "enable-lora", "enable-memory-saver", "disable-radix-cache"):
        parser.add_argument(f"--{name}", action="store_true")
    given, _ = parser.parse_known_args()
    flags = Flags(
        context_length=given.context_length or given.context,
        enable_deterministic_inference=given.enable_deterministic_inference,
        enable_lora=given.enable_lora,
        enable_memory_saver=given.enable_memory_saver,
        disable_radix_cache=given.disable_radix_cache,
        enable_return_routed_experts=given.enable_return_routed_experts,
        sampling_mask_max_tokens=given.sampling_mask_max_tokens,
    )
    server.run(contract(given.model, flags, *given.trap), given.host, given.port)


if __name__ == "__main__":
    main()
