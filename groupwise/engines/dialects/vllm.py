"""vLLM, from 0.32 on: its token wire, and its routes for reinforcement learning.

It has to be started as `groupwise.engines.launch` starts it: with those routes, with log-probs after the temperature,
and with the worker extension, which verifies weights and keeps a tied head's packed copy in step.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from groupwise.engines.connection import Connection, NoKey, Refused
from groupwise.engines.dialects.base import (
    CONTROL_SECONDS,
    TELLS_NOTHING,
    Answer,
    Call,
    Drawn,
    Facts,
    KeptOld,
    Models,
    Whose,
    distribution,
    parsed,
    recognising,
    seed_of,
    tokens_of,
)
from groupwise.engines.dialects.updated import Updated, adapter_name
from groupwise.engines.told import RawRoutes
from groupwise.engines.weights import Broadcast, Meeting, WeightRef
from groupwise.errors import EngineError, EngineLost
from groupwise.types import FinishReason, SampleRequest

_GENERATE = "/inference/v1/generate"
_ABORT_PREFIX = "generate-tokens-"
"""Without it, the route answers 200 and aborts nothing."""

_NOT_FOUND = 404
_PROOF_TOP_K = 64

_FINISHED: dict[str, FinishReason] = {"stop": "stop", "length": "length", "abort": "abort", "repetition": "length"}


class _Logprob(BaseModel):
    token_id: int
    logprob: float


class _Logprobs(BaseModel):
    content: tuple[_Logprob, ...]


class _Span(BaseModel):
    version: str
    start: int
    end: int


class _Choice(BaseModel):
    token_ids: tuple[int, ...]
    finish_reason: str | None
    logprobs: _Logprobs | None = None
    weight_versions: tuple[_Span, ...] | None = None
    routed_experts: str | None = None
    sampling_mask: list[list[int]] | None = None


class _Reply(BaseModel):
    choices: tuple[_Choice, ...] = Field(min_length=1, max_length=1)
    prompt_logprobs: tuple[dict[int, _Ranked] | None, ...] | None = None


class _Ranked(BaseModel):
    logprob: float


class _Info(BaseModel):
    weight_version: str | None = None


class _Flushed(BaseModel):
    success: bool = True


class _Loaded(BaseModel):
    """What one worker says of a load.

    Attributes:
        touched: whether the model may have changed before the error.
    """

    error: str = ""
    touched: bool = True


class _Hello(BaseModel):
    """What one worker says of groups.

    Attributes:
        nccl: its version; empty: it has none.
    """

    in_group: bool
    nccl: str


class _Results(BaseModel):
    results: tuple[Any, ...] = Field(min_length=1)


_Reply.model_rebuild()


class Vllm(Updated):
    """See `Updated`."""

    engine = "vllm"
    unload = "/v1/unload_lora_adapter"
    sleeper = "--enable-sleep-mode"
    health = "/health"
    alive = "/weight_info"  # the other says 200 while the engine behind it is frozen

    async def reach(self, server: Connection) -> Facts:
        """See `Dialect.reach`."""
        with recognising(server, "none of vLLM"):
            models = Models.model_validate(await server.get("/v1/models")).data
        base = next((model for model in models if not model.parent), None)
        if base is None:
            raise EngineError(f"{server.url} is a server, but none of vLLM: it lists adapters alone")
        facts = Facts(base.id, base.max_model_len)
        try:
            told = await server.get("/weight_info")
        except NoKey:
            raise
        except Refused as refused:
            problem = (
                f"{server.url} does not take weights ({refused.status}); start vLLM with VLLM_SERVER_DEV_MODE=1, as "
                "`groupwise engine command` prints it"
            )
            return replace(facts, problem=problem)
        with recognising(server, "none of vLLM"):
            facts = replace(facts, version=_Info.model_validate(told).weight_version)
        return await self._tried(server, facts) if self._tells != TELLS_NOTHING else facts

    async def _tried(self, server: Connection, facts: Facts) -> Facts:
        """Whether it tells what it is to tell, which only an answer says: one token is drawn."""
        params = {"temperature": 1.0, "top_k": 2, "max_tokens": 1, "logprobs": 0, "detokenize": False}
        body = {"model": facts.model, "token_ids": [0, 0], "sampling_params": params}
        try:
            choice = parsed(_Reply, await server.post(_GENERATE, body, seconds=CONTROL_SECONDS)).choices[0]
        except NoKey:
            raise
        except Refused as refused:
            return replace(facts, problem=f"{server.url} does not draw: {refused.said}")
        as_printed = ", as `groupwise engine command` prints it"
        problem = silent = ""
        if self._tells.kept and choice.sampling_mask is None:
            problem = (
                f"{server.url} does not tell which tokens its filters leave; start vLLM with --return-sampling-mask"
                f"{as_printed}"
            )
        if self._tells.routes and choice.routed_experts is None:
            silent = (
                f"{server.url} does not tell which experts it chose; start vLLM with --enable-return-routed-experts"
                f"{as_printed}"
            )
        return replace(facts, problem=problem, silent=silent)

    async def probe(self, server: Connection) -> None:
        """`/health` says 200 while the engine behind it is frozen; this route asks it."""
        try:
            await server.get("/weight_info")
        except Refused as refused:
            if refused.status != _NOT_FOUND:  # it is not there where the server takes no weights
                raise EngineLost(str(refused)) from refused

    def sample(self, request: SampleRequest, *, name: str, facts: Facts) -> Call:
        """One request per sample, each with a seed: neighbours of one request with `n` share theirs."""
        sampling = request.sampling
        params = {
            **self._params(request),
            **self._ends(sampling),
            "min_tokens": sampling.min_tokens,
        }
        if request.wants_routes:
            params["routed_experts_prompt_start"] = request.routes_from
        return self._call(request, params, name=name, model=self._model(request.policy_version, facts))

    def proof(self, request: SampleRequest, *, name: str, facts: Facts, whose: Whose = "policy") -> Call:
        """`min_tokens` would change the log-probs; `ignore_eos` does not. Where filters are told of, one is set, and
        proven with the rest."""
        if self._tells.kept:
            request = replace(request, sampling=replace(request.sampling, top_k=_PROOF_TOP_K))
        model = facts.model if whose == "base" else self._model(request.policy_version, facts)
        return self._call(request, {**self._params(request), "ignore_eos": True}, name=name, model=model)

    def _params(self, request: SampleRequest) -> dict[str, Any]:
        sampling = request.sampling
        if self._tells.kept and sampling.temperature == 0:  # it refuses 0 then, and this is the same
            sampling = replace(sampling, temperature=1.0, top_k=1, top_p=1.0, min_p=0.0)
        return {
            **distribution(sampling),
            "seed": seed_of(request.key, seed=sampling.seed, position=len(request.continues), bits=62),
            "n": 1,
            "max_tokens": sampling.max_tokens,
            "logprobs": 0,
            "skip_special_tokens": False,
            "detokenize": bool(sampling.stop),
        }

    def _call(self, request: SampleRequest, params: dict[str, Any], *, name: str, model: str) -> Call:
        body = {
            "model": model,
            "request_id": name,
            "token_ids": tokens_of(request),
            "sampling_params": params,
            "cache_salt": f"v{request.policy_version}",
        }
        return Call(_GENERATE, body)

    def drawn(self, answer: Answer) -> Drawn:
        """See `Dialect.drawn`."""
        choice = parsed(_Reply, answer).choices[0]
        content = () if choice.logprobs is None else choice.logprobs.content
        named = tuple(each.token_id for each in content)
        if named != choice.token_ids:
            raise EngineError(f"the answer has log-probs of {len(named)} tokens, and {len(choice.token_ids)} tokens")
        reason = str(choice.finish_reason)
        return Drawn(
            choice.token_ids,
            tuple(min(0.0, each.logprob) for each in content),
            _FINISHED.get(reason, "error"),
            tuple(span.version for span in choice.weight_versions or ()),
            error="" if reason in _FINISHED else f"vLLM ended it with {reason!r}",
            routes=None if choice.routed_experts is None else RawRoutes(choice.routed_experts, "npy"),
            kept=choice.sampling_mask,
        )

    def score(self, token_ids: Sequence[int], *, facts: Facts) -> Call | None:
        """`prompt_logprobs`, which vLLM computes past its prefix cache. With adapters switched on, it ends vLLM's CPU
        engine (0.32: its LoRA layers take the prompt's rows for those of samples); then drawing alone proves it."""
        if self._adapts:
            return None
        params = {"temperature": 1.0, "max_tokens": 1, "prompt_logprobs": 0, "detokenize": False}
        if self._tells.kept:  # it refuses a request without; the prompt's log-probs are those of all tokens
            params["top_k"] = 1
        return Call(_GENERATE, {"model": facts.model, "token_ids": list(token_ids), "sampling_params": params})

    def scores(self, answer: Answer) -> tuple[float, ...]:
        """See `Dialect.scores`."""
        found = parsed(_Reply, answer).prompt_logprobs
        if not found or any(each is None or not each for each in found[1:]):
            raise EngineError("vLLM gave no log-probs of the prompt")
        return tuple(next(iter(each.values())).logprob for each in found[1:] if each is not None)

    def _model(self, version: int, facts: Facts) -> str:
        """An adapter has a new name for each version, so that none is ever taken for another."""
        return adapter_name(version) if self._adapts else facts.model

    async def _load_model(self, server: Connection, ref: WeightRef) -> None:
        await self._control(server, "/pause", query={"mode": "abort"})
        await self._load_weights(server, ref)
        await self._flush(server)
        await self._control(server, "/update_weight_version", {"new_version": str(ref.version)})
        await self._control(server, "/resume")

    async def _load_weights(self, server: Connection, ref: WeightRef) -> None:
        if ref.broadcast is not None:
            await self._load_broadcast(server, ref, ref.broadcast)
        elif ref.memory is not None:
            await self._taken(server, ref, "groupwise_map", **asdict(ref.memory))
        elif ref.changes is not None:
            folders = [str(folder) for folder in (ref.folder, *ref.changes)]
            await self._taken(server, ref, "groupwise_change", folders=folders, version=ref.version)
        else:
            await self._taken(server, ref, "groupwise_load", path=str(ref.folder), version=ref.version)

    async def _load_broadcast(self, server: Connection, ref: WeightRef, sent: Broadcast) -> None:
        name = sent.group_of(server.url)
        workers = [
            _Hello.model_validate(each) for each in await self._called(server, "groupwise_hello", group=name or "")
        ]
        if sent.backend == "nccl" and (others := {each.nccl for each in workers} - {sent.nccl}):
            await self._control(server, "/resume")
            raise KeptOld(
                f"{server.url} has NCCL {', '.join(sorted(others)) or 'none'}, and this process {sent.nccl}: a group "
                "has to have one version; install the same in both environments, or set rollout.weights_by to "
                "'directory'"
            )

        async def take(meeting: Meeting, turn: int) -> None:
            body = {"meeting": asdict(meeting), "buckets": sent.buckets, "digest": sent.digest, "turn": turn}
            await self._taken(server, ref, "groupwise_receive", **body)

        anew = name is None or not all(each.in_group for each in workers)
        await sent.send_compared(server.url, take, workers=len(workers), anew=anew)

    async def _taken(self, server: Connection, ref: WeightRef, method: str, **named: Any) -> None:
        answers = await self._called(server, method, **named)
        try:
            results = [_Loaded.model_validate(answer) for answer in answers]
        except ValidationError as error:
            raise EngineError(f"{server.url} answered the load of version {ref.version} with {answers!r}") from error
        if not (failed := [result for result in results if result.error]):
            return
        said = f"{server.url}: version {ref.version} was not loaded: {failed[0].error}"
        if len(failed) == len(results) and not any(result.touched for result in failed):
            await self._control(server, "/resume")
            raise KeptOld(said)
        raise EngineError(said)

    async def _called(self, server: Connection, method: str, **named: Any) -> tuple[Any, ...]:
        """What each worker says."""
        answer: Answer = None
        try:
            call = {"method": method, "kwargs": named}
            answer = await server.post("/collective_rpc", call, seconds=self._load_seconds, watch=self.health)
            return _Results.model_validate(answer).results
        except Refused as refused:
            raise EngineError(
                f"weights were not loaded: {refused}; vLLM needs Groupwise's worker extension, as `groupwise engine "
                "command` prints it"
            ) from refused
        except ValidationError as error:
            raise EngineError(f"{server.url} answered {method} with {answer!r}") from error

    async def _flush(self, server: Connection) -> None:
        """What was cached was computed with other weights."""
        for _ in range(3):
            answer = await self._control(server, "/reset_prefix_cache", query={"reset_running_requests": "true"})
            if _Flushed.model_validate(answer).success:
                return
            await self._control(server, "/abort_requests", {})
            await asyncio.sleep(0.1)
        raise EngineError(f"{server.url} does not forget what it cached with other weights")

    async def _load_adapter(self, server: Connection, ref: WeightRef, named: Mapping[str, str]) -> None:
        try:
            await server.post("/v1/load_lora_adapter", named, seconds=self._load_seconds)
        except Refused as refused:
            if "already been loaded" not in refused.said:
                raise EngineError(
                    f"the adapter was not loaded: {refused}; vLLM needs --enable-lora, a --max-lora-rank that is "
                    "large enough and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"
                ) from refused
        await self._control(server, "/update_weight_version", {"new_version": str(ref.version)})

    async def _fall_asleep(self, server: Connection) -> None:
        """Its weights go to the host's memory: of the two levels, the one that a failed load can come back from."""
        await self._control(server, "/sleep", query={"level": "1"})

    async def wake(self, server: Connection) -> None:
        """See `Dialect.wake`."""
        await self._control(server, "/wake_up")

    async def abort(self, server: Connection, names: Sequence[str] | None) -> None:
        """See `Dialect.abort`."""
        body = {} if names is None else {"request_ids": [_ABORT_PREFIX + name for name in names]}
        await self._control(server, "/abort_requests", body)
