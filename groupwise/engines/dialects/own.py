"""Groupwise's own server, `groupwise serve`: the token wire, with what decides a sample's tokens beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from pydantic import BaseModel, Field

from groupwise.engines import wire
from groupwise.engines.connection import Connection, Refused
from groupwise.engines.dialects.base import (
    TELLS_NOTHING,
    Answer,
    Call,
    Card,
    Drawn,
    Facts,
    KeptOld,
    Tells,
    Whose,
    parsed,
    recognising,
    tokens_of,
)
from groupwise.engines.told import RawRoutes
from groupwise.engines.weights import WeightKind, WeightRef
from groupwise.errors import EngineError
from groupwise.protocols import EngineCaps
from groupwise.types import SampleRequest


class _Card(Card):
    groupwise: wire.ServedModel


class _Models(BaseModel):
    data: tuple[_Card, ...] = Field(min_length=1)


class Own:
    """The native engine in a process of its own.

    Args:
        exact: its log-probs are the trainer's, as it says itself.
        tells: what is learned from beside tokens; of filters it tells nothing, since its log-probs are those before.
    """

    health = alive = wire.HEALTH
    restarts = False
    stops = True
    takes: Sequence[WeightKind] = ("tensors",)

    def __init__(self, *, exact: bool = True, tells: Tells = TELLS_NOTHING) -> None:
        self.caps = EngineCaps(name="http", exact_logprobs=exact, seeded=True, routes=tells.routes)

    async def reach(self, server: Connection) -> Facts:
        """What model it has; see `Dialect.reach`."""
        with recognising(server, "none of `groupwise serve`"):
            model = _Models.model_validate(await server.get(wire.MODELS)).data[0]
        served = model.groupwise
        silent = ""
        if self.caps.routes and not served.routes:
            silent = f"{server.url} does not tell which experts it chose: it is on a GPU, or of an older Groupwise"
        return Facts(
            model.id,
            model.max_model_len,
            str(served.version),
            identity=served.identity,
            exact=served.exact,
            silent=silent,
        )

    async def probe(self, server: Connection) -> None:
        """Its front and its engine are one process."""
        await server.get(self.health)

    def name(self, request: SampleRequest) -> str:
        """The sample's own, which may be asked again."""
        return request.id

    def proof(self, request: SampleRequest, *, name: str, facts: Facts, whose: Whose = "policy") -> Call:
        """It has one set of weights, the policy's."""
        sampling = replace(request.sampling, min_tokens=request.sampling.max_tokens)
        return self.sample(replace(request, sampling=sampling), name=name, facts=facts)

    def sample(self, request: SampleRequest, *, name: str, facts: Facts) -> Call:
        """With the key that decides its tokens."""
        body = wire.GenerateBody(
            request_id=name,
            token_ids=tuple(tokens_of(request)),
            sampling_params=wire.SamplingBody.of(request.sampling),
            groupwise=wire.OwnKey(
                uid=request.key.uid,
                draw=request.key.draw,
                sample_index=request.key.sample_index,
                continues=len(request.continues),
                resumed=request.resumed,
                policy_version=request.policy_version,
                keeps=request.keeps,
                routes_from=request.routes_from if request.wants_routes else None,
            ),
        )
        return Call(wire.GENERATE, body.model_dump_json(exclude_none=True))

    def drawn(self, answer: Answer) -> Drawn:
        """See `Dialect.drawn`."""
        choice = parsed(wire.GenerateReply, answer).choices[0]
        return drawn_of(choice)

    def score(self, token_ids: Sequence[int], *, facts: Facts) -> Call | None:
        """It draws exactly what the trainer computes, so drawing proves it."""

    def scores(self, answer: Answer) -> tuple[float, ...]:
        raise EngineError("this server scores nothing")

    async def load(self, server: Connection, ref: WeightRef, facts: Facts) -> None:
        """The server compares every byte with the manifest before it touches its model."""
        body = wire.UpdateBody(version=ref.version, path=str(ref.newest))
        try:
            answer = await server.post(wire.UPDATE_WEIGHTS, body.model_dump_json())
        except Refused as refused:
            raise KeptOld(str(refused)) from refused
        if answer.get("version") != ref.version:
            raise EngineError(f"{server.url} took version {ref.version} of the weights and says {answer!r}")

    async def sleep(self, server: Connection) -> None:
        raise EngineError("this server does not sleep")

    async def wake(self, server: Connection) -> None:
        raise EngineError("this server does not sleep")

    async def abort(self, server: Connection, names: Sequence[str] | None) -> None:
        """By the samples' own names."""
        given = None if names is None else tuple(names)
        await server.post(wire.ABORT, wire.AbortBody(request_ids=given).model_dump_json())


def drawn_of(choice: wire.Choice) -> Drawn:
    """Of the token wire."""
    named = tuple(each.token_id for each in choice.logprobs.content)
    if choice.token_ids != named:
        raise EngineError(
            f"the answer has {len(named)} log-probs for {len(choice.token_ids)} tokens"
            if len(named) != len(choice.token_ids)
            else "the answer has log-probs of other tokens"
        )
    return Drawn(
        choice.token_ids,
        tuple(each.logprob for each in choice.logprobs.content),
        choice.finish_reason,
        tuple(span.version for span in choice.weight_versions),
        routes=None if choice.routed_experts is None else RawRoutes(choice.routed_experts, "npy"),
    )
