"""What every kind of server has to say for a run to sample from it."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias, TypeVar

from pydantic import BaseModel, Field, ValidationError

from groupwise.engines.connection import Connection, NoKey, Refused
from groupwise.engines.told import RawRoutes
from groupwise.engines.weights import WeightKind, WeightRef
from groupwise.errors import EngineError
from groupwise.inputs import SampleKey
from groupwise.protocols import EngineCaps
from groupwise.types import FinishReason, SampleRequest, SamplingParams

Said = TypeVar("Said", bound=BaseModel)

CONTROL_SECONDS = 60.0
"""Longest wait for a control route that has little to do: one that is asked while the engine dies never answers."""

Answer: TypeAlias = Any
"""JSON, as a server sent it."""


@dataclass(frozen=True, slots=True)
class Call:
    """One request of HTTP."""

    route: str
    body: Mapping[str, Any] | str


@dataclass(frozen=True, slots=True)
class Facts:
    """What a server says of itself.

    Attributes:
        model: its name there.
        positions: most tokens of prompt and completion; None where it does not say.
        version: of the weights that it holds, where it says.
        identity: of Groupwise's own server: facts to compare with the trainer's model.
        exact: its log-probs are the trainer's to the bit.
        problem: why a run cannot train over it, as it is; empty: it can.
        silent: why it does not tell which experts it chose, where it was to; empty: it does.
    """

    model: str
    positions: int | None = None
    version: str | None = None
    identity: Mapping[str, str] = field(default_factory=dict[str, str])
    exact: bool = False
    problem: str = ""
    silent: str = ""


@dataclass(frozen=True, slots=True)
class Drawn:
    """One answer, in the engine's own words.

    Attributes:
        token_ids: `[T]`, the token that ended it included.
        logprobs: `[T]`; None where the engine has none of the distribution that it drew from.
        versions: of the weights that drew it, where the engine says.
        text: where the engine may give no tokens to decode.
        routes: experts that were chosen, where they were asked for, from the first position that was.
        kept: `[T]`, the tokens that filters left, where the engine tells.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...] | None
    finish_reason: FinishReason
    versions: tuple[str, ...] = ()
    error: str = ""
    text: str | None = None
    routes: RawRoutes | None = None
    kept: Sequence[Sequence[int]] | None = None


@dataclass(frozen=True, slots=True)
class Tells:
    """What a run wants to be told beside tokens.

    Attributes:
        routes: the experts that were chosen.
        kept: the tokens that filters left.
    """

    routes: bool = False
    kept: bool = False


TELLS_NOTHING = Tells()

Whose: TypeAlias = Literal["policy", "base"]
"""The weights that are meant: those of the version, or what an adapter stands on."""


class Dialect(Protocol):
    """How one kind of server is spoken to. Objects hold a run's settings, and nothing of any one server.

    Attributes:
        takes: what it takes weights as; the first one is what it is given. Empty: it cannot be given any.
        health: a route that answers once the server is ready.
        alive: one that answers only while the engine behind the server works, as far as there is one.
        restarts: it reads weights only when it starts.
        stops: it ends an answer at the stop tokens and strings that it is given; else the answer is cut here.
    """

    @property
    def caps(self) -> EngineCaps: ...

    @property
    def takes(self) -> Sequence[WeightKind]: ...

    @property
    def health(self) -> str: ...

    @property
    def alive(self) -> str: ...

    @property
    def restarts(self) -> bool: ...

    @property
    def stops(self) -> bool: ...

    async def reach(self, server: Connection) -> Facts:
        """What the server says of itself.

        Raises:
            EngineLost: nothing answers.
            EngineError: it is no server of this kind, or one that cannot serve a run; says what to do.
        """
        ...

    async def probe(self, server: Connection) -> None:
        """Whether the engine behind the server works, and not only its front.

        Raises:
            EngineLost: it does not.
        """
        ...

    def name(self, request: SampleRequest) -> str:
        """What the request is called there, for `sample` and `abort`."""
        ...

    def sample(self, request: SampleRequest, *, name: str, facts: Facts) -> Call:
        """Ask for one sample."""
        ...

    def proof(self, request: SampleRequest, *, name: str, facts: Facts, whose: Whose = "policy") -> Call:
        """Ask for one that no token and no string ends before `max_tokens`, of the policy's weights or its base's."""
        ...

    def drawn(self, answer: Answer) -> Drawn:
        """What came of `sample`.

        Raises:
            EngineError: it is none.
        """
        ...

    def score(self, token_ids: Sequence[int], *, facts: Facts) -> Call | None:
        """Ask for the log-probs of given tokens, at temperature 1; None where it cannot be asked."""
        ...

    def scores(self, answer: Answer) -> tuple[float, ...]:
        """`[T - 1]`, of each token after the first.

        Raises:
            EngineError: it is no answer to `score`.
        """
        ...

    async def load(self, server: Connection, ref: WeightRef, facts: Facts) -> None:
        """Stop what is drawn, take the weights, forget what was computed with others, go on.

        Raises:
            EngineError: it failed, and what it holds now is unknown, unless it is a `KeptOld`.
        """
        ...

    async def sleep(self, server: Connection) -> None:
        """Give memory back; nothing is drawn until `wake`."""
        ...

    async def wake(self, server: Connection) -> None:
        """Take it again; then weights are loaded."""
        ...

    async def abort(self, server: Connection, names: Sequence[str] | None) -> None:
        """End these requests, or all."""
        ...


class KeptOld(EngineError):
    """The engine refused new weights before it touched what it has."""


class Card(BaseModel):
    """One of the models that a server lists.

    Attributes:
        parent: of an adapter: its base.
    """

    id: str
    max_model_len: int | None = None
    parent: str | None = None


class Models(BaseModel):
    """The answer of `/v1/models`."""

    data: tuple[Card, ...] = Field(min_length=1)


@contextmanager
def recognising(server: Connection, other: str) -> Generator[None]:
    """Around what only a server of one kind answers.

    Args:
        other: what the sentence says of a server of another kind, such as "none of vLLM".

    Raises:
        NoKey: it wants a key before it says anything.
        EngineError: it is of another kind.
    """
    try:
        yield
    except NoKey:
        raise
    except (Refused, ValidationError) as error:
        said = error.said if isinstance(error, Refused) else "it does not say which model it has"
        raise EngineError(f"{server.url} is a server, but {other}: {said}") from error


def parsed(kind: type[Said], answer: Answer, *, wanted: str = "the answer is no completion") -> Said:
    """The answer, as what it was to be.

    Args:
        wanted: what the sentence says of one that is not.

    Raises:
        EngineError: it is not.
    """
    try:
        return kind.model_validate(answer)
    except ValidationError as error:
        raise EngineError(f"{wanted}: {error}") from error


def new_name() -> str:
    """Of one length, because an engine aborts whatever begins so, and new for each try, because an engine may still
    have the one before."""
    return uuid.uuid4().hex


def seed_of(key: SampleKey, *, seed: int, position: int, bits: int) -> int:
    """The number that an engine's generator begins with: as good as another for any other sample, or turn of it.

    Args:
        seed: of the run.
        position: tokens that follow the prompt already.
    """
    text = f"{seed}/{key}/{position}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest()) >> (64 - bits)


def tokens_of(request: SampleRequest) -> list[int]:
    """Prompt, and what follows it already."""
    return [*request.prompt.token_ids, *request.continues.token_ids]


def distribution(sampling: SamplingParams) -> dict[str, float]:
    """What the next token is drawn from, in the names that most engines have. Every value is sent: what is left out
    may be another than here."""
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
    }
