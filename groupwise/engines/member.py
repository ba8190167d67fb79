"""One server of an engine: the weights it holds, the proof that it holds them, and how it comes back when it is lost.

ready(v) -> load -> proof -> ready(v + 1). What fails after loading began leaves a server whose weights nobody knows: it
is never asked for another sample before it was started anew, or at least loaded anew, and proven.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any, Protocol, TypeAlias

from groupwise.engines.connection import Connection, Refused
from groupwise.engines.dialects.base import Call, Dialect, Drawn, Facts, KeptOld, Whose
from groupwise.engines.weights import WeightRef
from groupwise.errors import EngineError, EngineLost
from groupwise.types import SampleRequest

logger = logging.getLogger(__name__)

_FIRST_WAIT, _LONGEST_WAIT = 0.1, 2.0
_HUNG_PROBES = 3
"""So many probes in a row without an answer, and a process of ours is ended."""

_TRIES = 3
"""A server that lives and answers wrongly is asked so often."""

_LOSSES = 5
"""A request whose server is lost once more than this is not asked again."""


class NotProven(EngineError):
    """The engine does not compute what the trainer does with the weights that were sent."""


class Launcher(Protocol):
    """Starts the server's process."""

    async def start(self, ref: WeightRef) -> None:
        """Returns once it answers.

        Raises:
            ConfigError, EngineError: it does not; with what its log says.
        """
        ...

    def alive(self) -> bool: ...

    async def kill(self) -> None:
        """Nothing of it is left."""
        ...

    async def stop(self) -> None:
        """As a user would end it."""
        ...


class Asked(Protocol):
    """What a proof asks of a server."""

    async def draw(self, request: SampleRequest, *, whose: Whose = "policy") -> Drawn:
        """A sample, to its last token."""
        ...

    async def score(self, token_ids: tuple[int, ...]) -> tuple[float, ...] | None:
        """Log-probs `[T - 1]` at temperature 1; None where the server scores nothing."""
        ...


Prover: TypeAlias = Callable[[Asked, WeightRef], Awaitable[None]]
"""Raises `NotProven`."""


class Member:
    """One server.

    Args:
        launcher: of a process that is the run's own; None: somebody else started it.
        patience: seconds to wait for a server that does not answer.
    """

    def __init__(
        self, dialect: Dialect, connection: Connection, *, launcher: Launcher | None = None, patience: float
    ) -> None:
        self._dialect = dialect
        self._server = connection
        self._launcher = launcher
        self._patience = patience
        self._facts: Facts | None = None
        self._ref: WeightRef | None = None
        self._prover: Prover | None = None
        self._proof: asyncio.Future[None] | None = None
        self._broken_proofs = 0
        self._generation = 0
        self._asleep = False
        self._mending = asyncio.Lock()
        self._names: dict[str, set[str]] = {}

    @property
    def url(self) -> str:
        return self._server.url

    @property
    def starts(self) -> bool:
        """Whether the server's process is the run's own."""
        return self._launcher is not None

    async def sample(self, request: SampleRequest) -> Drawn:
        """The answer of a server that is proven, however often it is lost meanwhile.

        Raises:
            EngineLost: it did not come back in time.
            EngineError: it answers what is no answer, or cannot be brought to serve the weights.
        """
        wrong = losses = 0
        while True:
            generation = self._generation
            try:
                drawn = await self._asked(request)
                async with self._mending:  # what was drawn before a mend is of weights that nobody vouches for
                    pass
                await self.proven()
            except EngineLost as error:
                losses += 1
                if losses > _LOSSES:
                    raise
                lost: EngineError = error
            except (Refused, OtherVersion, NotProven) as error:
                wrong += 1
                if wrong == _TRIES or (isinstance(error, Refused) and error.status < 500):
                    raise
                lost = error
            else:
                if self._generation == generation:
                    return drawn
                continue
            await self.mend(generation, lost)

    async def _asked(self, request: SampleRequest) -> Drawn:
        facts = await self.reach()
        if self._ref is None and facts.version is not None and facts.version.isdigit():
            request = replace(request, policy_version=int(facts.version))
        name = self._dialect.name(request)
        names = self._names.setdefault(request.id, set())
        names.add(name)
        try:
            drawn = self._dialect.drawn(await self._answer(self._dialect.sample(request, name=name, facts=facts)))
        finally:
            names.discard(name)
            if not names:
                self._names.pop(request.id, None)
        if self._ref is None:  # as in an evaluation, of whatever weights it has
            return drawn
        others = sorted({version for version in drawn.versions if version != str(request.policy_version)})
        if others:
            raise OtherVersion(f"{self.url} drew with version {', '.join(others)}, not {request.policy_version}")
        return drawn

    async def _answer(self, call: Call) -> Any:
        try:
            return await self._server.post(call.route, call.body)
        except Refused as refused:
            if refused.status == 409 and "other version" in refused.said:
                raise OtherVersion(str(refused)) from refused
            raise

    def _known(self) -> Facts:
        assert self._facts is not None, "a server is reached before it is asked"
        return self._facts

    async def draw(self, request: SampleRequest, *, whose: Whose = "policy") -> Drawn:
        """For a proof; see `Asked`."""
        name = self._dialect.name(request)
        call = self._dialect.proof(request, name=name, facts=self._known(), whose=whose)
        return self._dialect.drawn(await self._answer(call))

    async def score(self, token_ids: tuple[int, ...]) -> tuple[float, ...] | None:
        """For a proof; see `Asked`."""
        call = self._dialect.score(token_ids, facts=self._known())
        return None if call is None else self._dialect.scores(await self._answer(call))

    async def reach(self) -> Facts:
        """What it says of itself; waits a little for one that is just starting."""
        if self._facts is None:
            self._facts = await self._dialect.reach(self._server)
        return self._facts

    async def serve(self, ref: WeightRef, prover: Prover | None) -> None:
        """Hold these weights; the proof of it goes on when this returns, and every sample waits for it.

        Raises:
            EngineError: it does not take them.
        """
        async with self._mending:
            self._prover, self._broken_proofs = prover, 0
            deadline = time.monotonic() + self._patience
            if self._launcher is not None and (self._dialect.restarts or not self._launcher.alive()):
                await self._launcher.kill()
                await self._start(ref)
            await self._bring(ref, deadline)

    async def _bring(self, ref: WeightRef, deadline: float, *, may_hold: bool = False) -> None:
        """To these weights, however often it is lost meanwhile.

        Args:
            may_hold: it had them, and they were proven; a server that names them has them still.
        """
        while True:
            try:
                if may_hold and await self._holds(ref):
                    self._generation += 1
                    return
                await self.reach()
                await self._wake()
                await self._load(ref)
                return
            except EngineLost as lost:
                if time.monotonic() > deadline:
                    raise
                logger.warning("%s; bringing it version %d again", lost, ref.version)
                await self._bring_back(ref, deadline)

    async def rest(self) -> None:
        """Give memory back until the next weights come. A server that is lost meanwhile is found to be then."""
        if self._asleep or self._ref is None:
            return
        self._asleep = True
        if self._dialect.restarts and self._launcher is not None:
            await self._launcher.kill()
            return
        with suppress(EngineLost):
            await self._dialect.sleep(self._server)

    async def _wake(self) -> None:
        if self._asleep and not self._dialect.restarts:
            await self._dialect.wake(self._server)
        self._asleep = False

    async def _start(self, ref: WeightRef) -> None:
        assert self._launcher is not None
        self._asleep = False
        await self._launcher.start(ref)
        self._facts = None
        await self.reach()

    async def _load(self, ref: WeightRef) -> None:
        """One try; what it leaves behind where it fails is loaded again, from the beginning, once."""
        self._forget_proof()
        try:
            await self._dialect.load(self._server, ref, self._known())
        except KeptOld:
            raise
        except EngineLost:
            if self._launcher is not None:  # it may have part of the weights
                await self._launcher.kill()
            raise
        except EngineError as error:
            logger.warning("%s; what it holds is unknown: it gets version %d anew", error, ref.version)
            await self._restart(ref)
            await self._dialect.load(self._server, ref, self._known())
        self._ref = ref
        self._generation += 1
        if self._prover is not None:
            self._proof = asyncio.ensure_future(self._prover(self, ref))
            self._proof.add_done_callback(_seen)

    async def _restart(self, ref: WeightRef) -> None:
        """A process of ours is started again; one of somebody else's cannot be, and gets all weights again."""
        if self._launcher is not None:
            await self._launcher.kill()
            await self._start(ref)

    async def proven(self) -> None:
        """Until the proof of what is served is there.

        Raises:
            NotProven: it failed.
            EngineLost: the server was lost before.
        """
        if self._prover is None:
            return
        if (proof := self._proof) is None:
            raise EngineLost(f"{self.url} was being brought to its weights anew")
        await asyncio.wait([proof])
        if proof.cancelled():
            raise EngineLost(f"{self.url} was lost before it was proven")
        proof.result()

    async def prove(self, prover: Prover) -> None:
        """Another proof, which nobody waits for but the caller."""
        assert self._ref is not None, "a proof is of weights"
        await prover(self, self._ref)

    def _forget_proof(self) -> None:
        if self._proof is not None:
            self._proof.cancel()
            self._proof = None

    async def mend(self, generation: int, lost: EngineError) -> None:
        """Bring the server back to the weights that it is to serve; one caller does it for all.

        Args:
            generation: the one that failed; where a newer one is there, it was mended meanwhile.
            lost: why.

        Raises:
            EngineLost: it did not come back within the patience that it is given from now on.
            EngineError: twice it did not compute what the trainer does.
        """
        async with self._mending:
            if generation != self._generation:
                return
            deadline = time.monotonic() + self._patience
            logger.warning("%s; asking again", lost)
            if (ref := self._ref) is None:
                await self._wait(deadline)
                return
            broken = None if self._proof is None else _error_of(self._proof)
            if isinstance(broken, NotProven):
                self._broken_proofs += 1
                if self._broken_proofs > 1:
                    raise EngineError(f"{broken}; so it was after it was brought to these weights anew")
                self._forget_proof()
                await self._restart(ref)
                await self._bring(ref, deadline)
                return
            vouched_for = self._prover is None or (self._proof is not None and broken is None)
            await self._bring_back(ref, deadline)
            await self._bring(ref, deadline, may_hold=vouched_for)

    async def _holds(self, ref: WeightRef) -> bool:
        """Only a server that names what it holds, sample by sample, is believed."""
        self._facts = await self._dialect.reach(self._server)
        return ref.kind == "tensors" and self._facts.version == str(ref.version)

    async def _bring_back(self, ref: WeightRef, deadline: float) -> None:
        """Wait until it answers; a process of ours that is dead or hangs is started again."""
        if self._launcher is None:
            await self._wait(deadline)
            return
        for _ in range(_HUNG_PROBES):
            if not self._launcher.alive():
                break
            with suppress(EngineLost):
                await self._dialect.probe(self._server)
                return
            await asyncio.sleep(_LONGEST_WAIT)
        await self._launcher.kill()
        await self._start(ref)

    async def _wait(self, deadline: float) -> None:
        """Until it answers."""
        wait = _FIRST_WAIT
        while True:
            try:
                await self._dialect.probe(self._server)
                return
            except EngineLost:
                if time.monotonic() > deadline:
                    raise
            await asyncio.sleep(wait)
            wait = min(2 * wait, _LONGEST_WAIT)

    async def abort(self, request_ids: set[str] | None) -> None:
        """End these, or all."""
        if request_ids is None:
            await self._dialect.abort(self._server, None)
            return
        names = [name for asked in request_ids for name in self._names.get(asked, ())]
        if names:
            await self._dialect.abort(self._server, names)

    async def close(self) -> None:
        """End a process of ours; leave another as it is."""
        self._forget_proof()
        if self._launcher is not None:
            await self._launcher.stop()
        await self._server.close()


class OtherVersion(EngineError):
    """The server holds weights of another version than the request asks for."""


def _seen(proof: asyncio.Future[None]) -> None:
    """Whoever waits for it raises its error; asyncio need not complain of one that nobody waited for."""
    with suppress(asyncio.CancelledError):
        proof.exception()


def _error_of(proof: asyncio.Future[None]) -> BaseException | None:
    return proof.exception() if proof.done() and not proof.cancelled() else None
