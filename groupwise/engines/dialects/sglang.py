"""SGLang, from 0.5.23 on: its own `/generate`, and its routes for weights.

It has to be started with `--enable-deterministic-inference`: without, it ignores seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from pydantic import BaseModel

from groupwise.engines.connection import Connection, Refused
from groupwise.engines.dialects.base import (
    Answer,
    Call,
    Drawn,
    Facts,
    Whose,
    distribution,
    parsed,
    recognising,
    seed_of,
    tokens_of,
)
from groupwise.engines.dialects.distributed import described, joined
from groupwise.engines.dialects.updated import Updated, adapter_name
from groupwise.engines.told import RawRoutes
from groupwise.engines.weights import Broadcast, WeightRef
from groupwise.errors import EngineError
from groupwise.types import FinishReason, SampleRequest

_ROUTES_FLAG = "--enable-return-routed-experts"
_REASONS: dict[str, FinishReason] = {"stop": "stop", "length": "length", "abort": "abort"}


class _Reason(BaseModel):
    type: str
    matched: int | str | None = None
    message: str | None = None


class _Span(BaseModel):
    version: str


class _Meta(BaseModel):
    finish_reason: _Reason | None = None
    weight_version: str | None = None
    weight_versions: tuple[_Span, ...] | None = None
    output_token_logprobs: tuple[tuple[float | None, int, Any], ...] | None = None
    input_token_logprobs: tuple[tuple[float | None, int, Any], ...] | None = None
    output_token_sampling_logprobs: tuple[float, ...] | None = None
    output_token_sampling_mask: list[list[int]] | None = None
    routed_experts: str | None = None


class _Reply(BaseModel):
    output_ids: tuple[int, ...] = ()
    meta_info: _Meta


class _Outcome(BaseModel):
    success: bool = False
    message: str = ""


class _Info(BaseModel):
    served_model_name: str | None = None
    model_path: str | None = None
    weight_version: str | None = None


class _Started(BaseModel):
    context_length: int | None = None
    max_req_input_len: int | None = None
    tp_size: int = 1
    enable_deterministic_inference: bool | None = None
    enable_return_routed_experts: bool | None = None
    sampling_mask_max_tokens: int | None = None


class SgLang(Updated):
    """See `Updated`. All its requests' names are of one length: `/abort_request` ends whatever begins with one."""

    engine = "sglang"
    unload = "/unload_lora_adapter"
    sleeper = "--enable-memory-saver"
    health = alive = "/health"  # it draws a token

    async def reach(self, server: Connection) -> Facts:
        """See `Dialect.reach`."""
        with recognising(server, "none of SGLang 0.5.23 or newer"):
            info = _Info.model_validate(await server.get("/model_info"))
            started = _Started.model_validate(await server.get("/server_info"))
        problem = ""
        if started.enable_deterministic_inference is False:
            problem = (
                f"{server.url} ignores seeds, so no sample could be drawn again; start SGLang with "
                "--enable-deterministic-inference"
            )
        if self._tells.kept and started.sampling_mask_max_tokens is None:
            problem = (
                problem or f"{server.url} does not tell which tokens its filters leave; use SGLang 0.5.23 or newer"
            )
        silent = ""
        if self._tells.routes and not started.enable_return_routed_experts:
            silent = f"{server.url} does not tell which experts it chose; start SGLang with {_ROUTES_FLAG}"
        positions = started.context_length or started.max_req_input_len
        name = info.served_model_name or info.model_path or "default"
        return Facts(name, positions, info.weight_version, problem=problem, silent=silent)

    async def probe(self, server: Connection) -> None:
        """This route draws a token."""
        await server.get("/health_generate", seconds=30.0)

    def proof(self, request: SampleRequest, *, name: str, facts: Facts, whose: Whose = "policy") -> Call:
        """`ignore_eos` makes it deaf to every stop token."""
        params = {**self._params(request), "ignore_eos": True}
        return self._call(request, params, name=name, adapter=whose == "policy")

    def sample(self, request: SampleRequest, *, name: str, facts: Facts) -> Call:
        """See `Dialect.sample`."""
        sampling = request.sampling
        params = {
            **self._params(request),
            **self._ends(sampling),
            "min_new_tokens": sampling.min_tokens,
        }
        call = self._call(request, params, name=name, adapter=True)
        asked: dict[str, Any] = {}
        if request.wants_kept:
            asked["return_sampling_mask"] = True
        if request.wants_routes:
            asked |= {"return_routed_experts": True, "routed_experts_start_len": request.routes_from}
        assert not isinstance(call.body, str), "its bodies are mappings"
        return Call(call.route, {**call.body, **asked})

    def _params(self, request: SampleRequest) -> dict[str, Any]:
        sampling = request.sampling
        return {
            **distribution(sampling),
            "top_k": sampling.top_k or -1,
            "max_new_tokens": sampling.max_tokens,
            "sampling_seed": seed_of(request.key, seed=sampling.seed, position=len(request.continues), bits=31),
            "skip_special_tokens": False,
            "no_stop_trim": True,
        }

    def _call(self, request: SampleRequest, params: dict[str, Any], *, name: str, adapter: bool) -> Call:
        body: dict[str, Any] = {
            "rid": name,
            "input_ids": tokens_of(request),
            "sampling_params": params,
            "return_logprob": True,
            "cache_salt": f"v{request.policy_version}/{adapter}",
        }
        if adapter and self._adapts:
            body["lora_path"] = adapter_name(request.policy_version)
        return Call("/generate", body)

    def drawn(self, answer: Answer) -> Drawn:
        """See `Dialect.drawn`; a log-prob that is no number comes as a stop of that name."""
        reply = parsed(_Reply, answer)
        meta = reply.meta_info
        pairs = meta.output_token_logprobs or ()
        if tuple(token for _, token, _ in pairs) != reply.output_ids:
            raise EngineError(f"SGLang answered {len(reply.output_ids)} tokens, and log-probs of {len(pairs)}")
        reason = meta.finish_reason or _Reason(type="none")
        finish, error = _REASONS.get(reason.type, "error"), ""
        if finish == "error" or "NaN" in str(reason.matched):
            finish, error = "error", f"SGLang ended it with {reason.type!r}: {reason.message or reason.matched}"
        elif finish == "abort":  # asked for, or of its own: a set of tokens that is larger than it tells of
            error = f"SGLang ended it: {reason.message or 'abort'}"
        logprobs = [value for value, _, _ in pairs]
        if (drawn_from := meta.output_token_sampling_logprobs) is not None:  # of what the filters left
            if len(drawn_from) != len(pairs):
                raise EngineError(f"SGLang answered {len(pairs)} tokens, and log-probs of {len(drawn_from)} as drawn")
            logprobs = list(drawn_from)
        spans = meta.weight_versions or ()
        versions = tuple(span.version for span in spans) or ((meta.weight_version,) if meta.weight_version else ())
        return Drawn(
            reply.output_ids,
            tuple(-9999.0 if value is None else min(0.0, value) for value in logprobs),
            finish,
            () if self._adapts else versions,  # the label is the base's
            error=error,
            routes=None if meta.routed_experts is None else RawRoutes(meta.routed_experts, "int32"),
            kept=meta.output_token_sampling_mask,
        )

    def score(self, token_ids: Sequence[int], *, facts: Facts) -> Call | None:
        """The prompt's log-probs, of one sample of one token. With an adapter, drawing alone proves it, as for vLLM."""
        if self._adapts:
            return None
        body: dict[str, Any] = {
            "input_ids": list(token_ids),
            "sampling_params": {"temperature": 1.0, "max_new_tokens": 1},
            "return_logprob": True,
            "logprob_start_len": 0,
        }
        return Call("/generate", body)

    def scores(self, answer: Answer) -> tuple[float, ...]:
        """See `Dialect.scores`."""
        pairs = parsed(_Reply, answer).meta_info.input_token_logprobs or ()
        if len(pairs) < 2 or any(value is None for value, _, _ in pairs[1:]):
            raise EngineError("SGLang gave no log-probs of the prompt")
        return tuple(value for value, _, _ in pairs[1:] if value is not None)

    async def _load_model(self, server: Connection, ref: WeightRef) -> None:
        """What fails is torn: SGLang's way back reads the new folder, not the old."""
        await self._control(server, "/pause_generation", {"mode": "abort"})
        if ref.broadcast is None:
            await self._load_folder(server, ref)
        else:
            await self._load_broadcast(server, ref, ref.broadcast)
        await self._control(server, "/continue_generation")

    async def _load_folder(self, server: Connection, ref: WeightRef) -> None:
        body = {"model_path": str(ref.folder), "weight_version": str(ref.version), "flush_cache": True}
        try:
            await server.post("/update_weights_from_disk", body, seconds=self._load_seconds)
        except Refused as refused:
            if "cache" not in refused.said or "not flushed" not in refused.said:
                raise EngineError(f"version {ref.version} was not loaded: {refused}") from refused
            await self._control(server, "/flush_cache")  # the weights did change

    async def _load_broadcast(self, server: Connection, ref: WeightRef, sent: Broadcast) -> None:
        """Bucket by bucket, between a beginning and an end, which has to come before the next beginning."""
        if sent.group_of(server.url) is None:
            started = _Started.model_validate(await server.get("/server_info"))
            await sent.meet(server.url, workers=started.tp_size, join=partial(joined, server))
        await self._control(server, "/begin_weight_update", {})
        try:
            for number, bucket in enumerate(sent.buckets):
                last = number == len(sent.buckets) - 1
                body = {
                    **described(bucket, group=sent.group_of(server.url)),
                    "flush_cache": last,
                    "weight_version": str(ref.version) if last else None,
                }
                take = partial(server.post, "/update_weights_from_distributed", body, seconds=self._load_seconds)
                await sent.send(server.url, number, take, typed=False)
        except Refused as refused:
            if "cache" not in refused.said or "not flushed" not in refused.said:
                raise EngineError(f"version {ref.version} was not loaded: {refused}") from refused
            await self._control(server, "/flush_cache")
        finally:
            with suppress(EngineError):
                await self._control(server, "/end_weight_update", {})

    async def _load_adapter(self, server: Connection, ref: WeightRef, named: Mapping[str, str]) -> None:
        try:
            found = _Outcome.model_validate(await server.post("/load_lora_adapter", named, seconds=self._load_seconds))
        except Refused as refused:
            found = _Outcome(message=refused.said)
        if not found.success and "already" not in found.message:
            raise EngineError(
                f"{server.url}: the adapter was not loaded: {found.message}; SGLang needs --enable-lora, and "
                "--max-lora-rank that is large enough"
            )

    async def _fall_asleep(self, server: Connection) -> None:
        await self._control(server, "/release_memory_occupation")

    async def wake(self, server: Connection) -> None:
        """See `Dialect.wake`."""
        await self._control(server, "/resume_memory_occupation")

    async def abort(self, server: Connection, names: Sequence[str] | None) -> None:
        """See `Dialect.abort`."""
        bodies: list[dict[str, Any]] = [{"abort_all": True}] if names is None else [{"rid": name} for name in names]
        for body in bodies:
            await self._control(server, "/abort_request", body)
