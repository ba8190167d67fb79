"""An engine in other processes: servers that draw what the policy would, each spoken to in its own dialect.

One request per sample, each with its own seed, so a request that was lost is asked again and stands for the same
sample. A group stays on one server, which computes its prompt once.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace

from groupwise.engines.dialects.base import Drawn
from groupwise.engines.member import Member, Prover
from groupwise.engines.told import Unusable, usable_kept, usable_routes
from groupwise.engines.weights import WeightKind, WeightRef
from groupwise.errors import EngineError
from groupwise.protocols import EngineCaps
from groupwise.sides import NO_SIDES, Mixture, Sides
from groupwise.types import Completion, SampleRequest


@dataclass(slots=True)
class _Group:
    """The samples of one prompt that are under way."""

    member: Member
    running: int = 0


@dataclass(slots=True)
class HttpEngine:
    """Implements `groupwise.protocols.Engine` over servers; `groupwise.engines.external` makes it of a config.

    Attributes:
        members: the servers; they hold the same weights.
        takes: what they take weights as.
        decode: token ids to text, special tokens left out.
        encode: text to token ids, for servers that give text alone.
        vocabulary: tokens from 0 up to this are the model's.
        stop_token_ids: the model's own.
        cuts: answers are ended here, at the first token that is a stop token or completes a stop string.
        most: samples that are asked for at one time.
        mixture: the model's routers, where their choices are wanted.
    """

    caps: EngineCaps
    members: Sequence[Member]
    takes: Sequence[WeightKind]
    decode: Callable[[Sequence[int]], str]
    encode: Callable[[str], Sequence[int]]
    vocabulary: int
    most: int
    stop_token_ids: frozenset[int] = frozenset()
    cuts: bool = False
    mixture: Mixture | None = None
    prover: Prover | None = None
    _groups: dict[tuple[str, int], _Group] = field(default_factory=dict[tuple[str, int], _Group])
    _room: asyncio.Semaphore | None = None

    async def generate(self, requests: Sequence[SampleRequest]) -> AsyncIterator[Completion]:
        """Yield one completion per request, as each finishes; a lost server is waited for, or started again.

        Raises:
            EngineLost: it did not come back within `rollout.engine_timeout`.
            EngineError: it answered what is no answer to the request.
        """
        tasks = [asyncio.ensure_future(self._completion(request)) for request in requests]
        try:
            for done in asyncio.as_completed(tasks):
                yield await done
        finally:
            for task in tasks:
                task.cancel()

    async def _completion(self, request: SampleRequest) -> Completion:
        if self._room is None:
            self._room = asyncio.Semaphore(self.most)
        group = self._group_of(request)
        group.running += 1
        try:
            async with self._room:
                drawn = await group.member.sample(request)
        finally:
            group.running -= 1
            if not group.running and not request.keeps:
                self._groups.pop((request.key.uid, request.key.draw), None)
        return self._checked(request, drawn, group.member.url)

    def _group_of(self, request: SampleRequest) -> _Group:
        """A group goes to the server with the fewest samples, and stays there."""
        name = (request.key.uid, request.key.draw)
        if name not in self._groups:
            waiting = {id(member): 0 for member in self.members}
            for group in self._groups.values():
                waiting[id(group.member)] += group.running
            self._groups[name] = _Group(min(self.members, key=lambda member: waiting[id(member)]))
        return self._groups[name]

    def _checked(self, request: SampleRequest, drawn: Drawn, url: str) -> Completion:
        if self.cuts:
            drawn = self._cut(request, drawn)
        tokens = self._tokens(request, drawn)
        logprobs = self._logprobs(drawn, len(tokens))
        if wrong := _wrong_logprobs(logprobs, tokens) or self._wrong_tokens(request, drawn, tokens):
            raise EngineError(f"{url} answered {request.id} with {wrong}")
        error, sides = drawn.error, NO_SIDES
        try:
            sides = self._sides(request, drawn, tokens)
        except Unusable as unusable:
            error = error or f"{self.caps.name}: {unusable}"
        return Completion(
            key=request.key,
            token_ids=tokens,
            logprobs=logprobs,
            policy_versions=(request.policy_version,) * len(tokens),
            text=self.decode(tokens) if drawn.text is None else drawn.text,
            finish_reason="error" if error and drawn.finish_reason != "abort" else drawn.finish_reason,
            error=error,
            sides=sides,
        )

    def _sides(self, request: SampleRequest, drawn: Drawn, tokens: Sequence[int]) -> Sides:
        """What the request wanted beside tokens; what cannot be of it fails the one sample, and not the run."""
        routes = kept = None
        if request.wants_kept:
            kept = usable_kept(drawn.kept, tokens, vocabulary=self.vocabulary)
        if request.wants_routes and tokens:
            assert self.mixture is not None, "choices of experts were asked of no mixture"
            end = len(request.prompt) + len(request.continues) + len(tokens) - 1
            routes = usable_routes(drawn.routes, self.mixture, first=request.routes_from, end=end)
        return Sides(routes, kept)

    def _tokens(self, request: SampleRequest, drawn: Drawn) -> tuple[int, ...]:
        """Those that came, or those of the text where it came alone."""
        if drawn.token_ids or not drawn.text:
            return drawn.token_ids
        return tuple(self.encode(drawn.text))[: request.sampling.max_tokens]

    def _logprobs(self, drawn: Drawn, count: int) -> tuple[float, ...]:
        """Zeros where the engine has none, which nothing learns from."""
        if drawn.logprobs is not None:
            return drawn.logprobs
        assert not self.caps.logprobs, f"{self.caps.name} says that it has log-probs"
        return (0.0,) * count

    def _wrong_tokens(self, request: SampleRequest, drawn: Drawn, tokens: Sequence[int]) -> str:
        """What cannot be of the tokens; empty where nothing is."""
        most = request.sampling.max_tokens
        if tokens and not 0 <= min(tokens) <= max(tokens) < self.vocabulary:
            return f"token {max(tokens)}, of a vocabulary of {self.vocabulary}"
        if len(tokens) > most:
            return f"{len(tokens)} tokens, of at most {most}"
        if drawn.finish_reason == "length" and drawn.text is None and len(tokens) < most:
            return f"{len(tokens)} tokens, cut before {most}: its context is too short"
        return ""

    def _cut(self, request: SampleRequest, drawn: Drawn) -> Drawn:
        sampling = request.sampling
        ends = self.stop_token_ids | {*sampling.stop_token_ids}
        text = ""
        for number, token in enumerate(drawn.token_ids, 1):
            if sampling.stop:
                text = self.decode(drawn.token_ids[:number])
            if number >= sampling.min_tokens and (token in ends or any(stop in text for stop in sampling.stop)):
                logprobs = None if drawn.logprobs is None else drawn.logprobs[:number]
                return replace(drawn, token_ids=drawn.token_ids[:number], logprobs=logprobs, finish_reason="stop")
        return drawn

    @property
    def starts(self) -> bool:
        """Whether it starts processes of its own, which need a folder to begin with."""
        return any(member.starts for member in self.members)

    async def load(self, ref: WeightRef) -> None:
        """Serve these weights. Each server takes them at the same time; samples wait for its proof.

        Raises:
            EngineError: one does not take them.
        """
        self._groups = {name: group for name, group in self._groups.items() if group.running}
        await asyncio.gather(*(member.serve(ref, self.prover) for member in self.members))

    async def prove(self, prover: Prover) -> None:
        """Ask each server for another proof, of what it serves.

        Raises:
            NotProven: one has no such proof.
        """
        await asyncio.gather(*(member.prove(prover) for member in self.members))

    async def proven(self) -> None:
        """Until each server's proof is there."""
        await asyncio.gather(*(member.proven() for member in self.members))

    async def rest(self) -> None:
        """Nothing is drawn until the next weights come: give memory back."""
        await asyncio.gather(*(member.rest() for member in self.members))

    async def abort(self, request_ids: Sequence[str] | None = None) -> None:
        """End these requests (or all) now."""
        names = None if request_ids is None else set(request_ids)
        await asyncio.gather(*(member.abort(names) for member in self.members))

    async def close(self) -> None:
        """Close connections, and end the processes that are the run's own."""
        await asyncio.gather(*(member.close() for member in self.members))


def _wrong_logprobs(logprobs: Sequence[float], tokens: Sequence[int]) -> str:
    """What cannot be of them; empty where nothing is."""
    if len(logprobs) != len(tokens):
        return f"{len(logprobs)} log-probs for {len(tokens)} tokens"
    if not all(math.isfinite(value) and -9999.0 < value <= 0 for value in logprobs):
        return "a log-prob that stands for a missing one"
    return ""
