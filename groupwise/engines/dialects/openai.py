"""Any server with OpenAI's `/v1/completions`: for evaluations. It takes no weights.

Tokens go in as numbers. They come back as numbers where the server can (`return_token_ids`, or log-probs of tokens that
are named `token_id:N`); else the answer's text is what is judged.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, Field

from groupwise.engines.connection import Connection
from groupwise.engines.dialects.base import (
    Answer,
    Call,
    Drawn,
    Facts,
    Models,
    Whose,
    new_name,
    parsed,
    recognising,
    seed_of,
    tokens_of,
)
from groupwise.engines.weights import WeightKind, WeightRef
from groupwise.errors import EngineError
from groupwise.protocols import EngineCaps
from groupwise.types import FinishReason, SampleRequest

_REASONS: dict[str, FinishReason] = {"stop": "stop", "length": "length"}
_TOKEN = "token_id:"


class _Logprobs(BaseModel):
    tokens: tuple[str, ...] = ()


class _Choice(BaseModel):
    text: str = ""
    finish_reason: str | None = None
    token_ids: tuple[int, ...] | None = None
    logprobs: _Logprobs | None = None


class _Reply(BaseModel):
    choices: tuple[_Choice, ...] = Field(min_length=1, max_length=1)


class OpenAi:
    """Over HTTP."""

    health = alive = "/v1/models"
    takes: Sequence[WeightKind] = ()
    restarts = False
    stops = True

    def __init__(self) -> None:
        self.caps = EngineCaps(name="openai", exact_logprobs=False, seeded=False, logprobs=False)

    async def reach(self, server: Connection) -> Facts:
        """See `Dialect.reach`."""
        with recognising(server, "lists no models as OpenAI does"):
            models = Models.model_validate(await server.get(self.health))
        return Facts(models.data[0].id, models.data[0].max_model_len, problem="it takes no weights")

    async def probe(self, server: Connection) -> None:
        """Whether it answers."""
        await server.get(self.health)

    def name(self, request: SampleRequest) -> str:
        """Requests have none."""
        return new_name()

    def proof(self, request: SampleRequest, *, name: str, facts: Facts, whose: Whose = "policy") -> Call:
        raise EngineError("weights of such a server are whose they are: there is nothing to prove")

    def sample(self, request: SampleRequest, *, name: str, facts: Facts) -> Call:
        """Only what OpenAI's own interface has, and the wish for tokens."""
        sampling = request.sampling
        body: dict[str, Any] = {
            "model": facts.model,
            "prompt": tokens_of(request),
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": seed_of(request.key, seed=sampling.seed, position=len(request.continues), bits=31),
            "n": 1,
            "return_token_ids": True,
        }
        if sampling.stop:
            body["stop"] = list(sampling.stop)
        return Call("/v1/completions", body)

    def drawn(self, answer: Answer) -> Drawn:
        """See `Dialect.drawn`."""
        choice = parsed(_Reply, answer).choices[0]
        reason = str(choice.finish_reason)
        return Drawn(
            _tokens(choice),
            None,
            _REASONS.get(reason, "error"),
            error="" if reason in _REASONS else f"the server ended it with {reason!r}",
            text=choice.text,
        )

    def score(self, token_ids: Sequence[int], *, facts: Facts) -> Call | None:
        """It scores nothing."""

    def scores(self, answer: Answer) -> tuple[float, ...]:
        raise EngineError("this server scores nothing")

    async def load(self, server: Connection, ref: WeightRef, facts: Facts) -> None:
        raise EngineError(f"{server.url} takes no weights")

    async def sleep(self, server: Connection) -> None:
        raise EngineError("this server does not sleep")

    async def wake(self, server: Connection) -> None:
        raise EngineError("this server does not sleep")

    async def abort(self, server: Connection, names: Sequence[str] | None) -> None:
        """A request ends with its connection."""


def _tokens(choice: _Choice) -> tuple[int, ...]:
    if choice.token_ids is not None:
        return choice.token_ids
    named = () if choice.logprobs is None else choice.logprobs.tokens
    if named and all(name.startswith(_TOKEN) for name in named):
        return tuple(int(name.removeprefix(_TOKEN)) for name in named)
    return ()
