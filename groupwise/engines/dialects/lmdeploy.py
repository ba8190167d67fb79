"""LMDeploy, from 0.18 on, with its PyTorch engine.

It has no route that reads weights from a folder, so the run starts it again with each version, unless weights are
broadcast to it. Its log-probs are those before the temperature, so at another than 1 the trainer's own stand for them.
Of its two routes that take tokens, one has no seed and the other no stop tokens: the one with a seed is used, and
answers are cut here.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from groupwise.engines.connection import Connection, Refused
from groupwise.engines.dialects.base import (
    CONTROL_SECONDS,
    Answer,
    Call,
    Drawn,
    Facts,
    Models,
    Whose,
    distribution,
    new_name,
    parsed,
    recognising,
    seed_of,
    tokens_of,
)
from groupwise.engines.dialects.distributed import described, joined
from groupwise.engines.weights import WeightKind, WeightRef
from groupwise.errors import EngineError
from groupwise.protocols import EngineCaps
from groupwise.types import FinishReason, SampleRequest

_REASONS: dict[str, FinishReason] = {"stop": "stop", "length": "length", "abort": "abort"}
_CHAT = "/v1/chat/completions"


class _Choice(BaseModel):
    output_ids: tuple[int, ...] | None = None
    output_token_logprobs: tuple[tuple[float, int], ...] | None = None
    finish_reason: str | None = None


class _Reply(BaseModel):
    choices: tuple[_Choice, ...] = Field(min_length=1, max_length=1)


class _Info(BaseModel):
    tp_size: int


class _Meta(BaseModel):
    input_token_logprobs: tuple[tuple[float, int], ...] | None = None


class _Scored(BaseModel):
    meta_info: _Meta


class LmDeploy:
    """Over HTTP; nothing of LMDeploy is imported.

    Args:
        logprobs: samples are learned at the temperature 1, which its log-probs are of.
        broadcasts: weights come while it runs.
        load_seconds: longest wait for a bucket of them to be loaded.
    """

    health = alive = "/health"
    takes: Sequence[WeightKind] = ("model",)
    stops = False

    def __init__(self, *, logprobs: bool = True, broadcasts: bool = False, load_seconds: float = 600.0) -> None:
        self.restarts = not broadcasts
        self._load_seconds = load_seconds
        self.caps = EngineCaps(name="lmdeploy", exact_logprobs=False, seeded=True, logprobs=logprobs, scores=True)

    async def reach(self, server: Connection) -> Facts:
        """See `Dialect.reach`; it says nothing of versions."""
        with recognising(server, "none of LMDeploy"):
            models = Models.model_validate(await server.get("/v1/models"))
        if not self.restarts:
            return Facts(models.data[0].id)
        problem = (
            f"{server.url} cannot be given weights: LMDeploy reads a folder only when it starts; set "
            "rollout.weights_by = 'nccl', or let the run start it, with rollout.launch.python"
        )
        return Facts(models.data[0].id, problem=problem)

    async def probe(self, server: Connection) -> None:
        """Its own probe asks the engine every few seconds, and this route says what came of it."""
        await server.get(self.health)

    def name(self, request: SampleRequest) -> str:
        """Its requests have numbers; they end with their connection."""
        return new_name()

    def proof(self, request: SampleRequest, *, name: str, facts: Facts, whose: Whose = "policy") -> Call:
        """It has one set of weights, the policy's."""
        return Call(_CHAT, {**self._body(request, facts), "ignore_eos": True})

    def sample(self, request: SampleRequest, *, name: str, facts: Facts) -> Call:
        """See `Dialect.sample`."""
        return Call(_CHAT, self._body(request, facts))

    def _body(self, request: SampleRequest, facts: Facts) -> dict[str, Any]:
        """Every value is sent: what is not given is 0.8 for the temperature and 50 for top-k."""
        sampling = request.sampling
        return {
            "model": facts.model,
            "messages": [],
            "input_ids": tokens_of(request),
            "seed": seed_of(request.key, seed=sampling.seed, position=len(request.continues), bits=32),
            "n": 1,
            **distribution(sampling),
            "max_completion_tokens": sampling.max_tokens,
            "min_new_tokens": sampling.min_tokens,
            "skip_special_tokens": False,
            "return_token_ids": True,
            "return_logprob": True,
            "include_stop_str_in_output": True,
        }

    def drawn(self, answer: Answer) -> Drawn:
        """See `Dialect.drawn`."""
        choice = parsed(_Reply, answer).choices[0]
        tokens, pairs = choice.output_ids or (), choice.output_token_logprobs or ()
        if tuple(token for _, token in pairs) != tokens:
            raise EngineError(
                f"LMDeploy answered {len(tokens)} tokens, and log-probs of {len(pairs)}; it needs "
                "--logprobs-mode raw_logprobs"
            )
        reason = str(choice.finish_reason)
        return Drawn(
            tokens,
            tuple(min(0.0, value) for value, _ in pairs) if self.caps.logprobs else None,
            _REASONS.get(reason, "error"),
            error="" if reason in _REASONS else f"LMDeploy ended it with {reason!r}",
        )

    def score(self, token_ids: Sequence[int], *, facts: Facts) -> Call | None:
        """Only the other route scores."""
        body = {
            "input_ids": list(token_ids),
            "return_logprob": True,
            "logprob_start_len": 0,
            "max_tokens": 0,
            "temperature": 1.0,
            "top_p": 1.0,
            "top_k": 0,
        }
        return Call("/generate", body)

    def scores(self, answer: Answer) -> tuple[float, ...]:
        """See `Dialect.scores`."""
        found = parsed(_Scored, answer, wanted="LMDeploy gave no log-probs of the prompt")
        pairs = found.meta_info.input_token_logprobs or ()
        return tuple(min(0.0, value) for value, _ in pairs)

    async def load(self, server: Connection, ref: WeightRef, facts: Facts) -> None:
        """It was started with these weights, unless they are broadcast. Then it sleeps meanwhile, since it has no other
        pause, which drops its cache of the old ones."""
        if (sent := ref.broadcast) is None:
            return
        if sent.group_of(server.url) is None:
            await sent.meet(server.url, workers=await self._workers(server), join=partial(joined, server))
        await self.sleep(server)
        await server.post("/wakeup", seconds=CONTROL_SECONDS, query={"tags": "weights"})
        try:
            for number, bucket in enumerate(sent.buckets):
                body = described(bucket, group=sent.group_of(server.url))
                body["finished"] = number == len(sent.buckets) - 1
                take = partial(server.post, "/update_weights_from_distributed", body, seconds=self._load_seconds)
                await sent.send(server.url, number, take, typed=True)
        except Refused as refused:
            raise EngineError(f"version {ref.version} was not loaded: {refused}") from refused
        await server.post("/wakeup", seconds=CONTROL_SECONDS, query={"tags": "kv_cache"})

    async def _workers(self, server: Connection) -> int:
        """This route answers JSON in a text of JSON."""
        told = await server.get("/distserve/engine_info")
        try:
            return (
                _Info.model_validate_json(told).tp_size if isinstance(told, str) else _Info.model_validate(told).tp_size
            )
        except ValidationError as error:
            raise EngineError(f"{server.url} does not say how many GPUs it has: {told!r}") from error

    async def sleep(self, server: Connection) -> None:
        """Its weights go to the host's memory. Where the next version starts it anew, its process is ended instead."""
        await server.post("/sleep", seconds=CONTROL_SECONDS, query={"level": "1"})

    async def wake(self, server: Connection) -> None:
        """See `Dialect.wake`."""
        await server.post("/wakeup", seconds=CONTROL_SECONDS)

    async def abort(self, server: Connection, names: Sequence[str] | None) -> None:
        """Of single ones it hears nothing: they end when their connection does."""
        if names is None:
            await server.post("/abort_request", {"abort_all": True}, seconds=CONTROL_SECONDS)
