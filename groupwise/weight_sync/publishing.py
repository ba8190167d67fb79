"""A policy version to engines in other processes: made ready, loaded, proven."""

from __future__ import annotations

import time

from groupwise.engines.http import HttpEngine
from groupwise.metrics import Last, Metrics
from groupwise.protocols import Policy
from groupwise.weight_sync.canary import Canary
from groupwise.weight_sync.way import Way


class EngineSync:
    """Has every server take a version, and prove that it computes with it.

    Args:
        way: how it travels.
        canary: proves a server; samples of a version wait for it.
        sleeps: between the last sample of a step and the next version, servers give their memory back.

    Attributes:
        seconds: that the last version took to be made ready and loaded.
    """

    def __init__(self, policy: Policy, engine: HttpEngine, way: Way, *, canary: Canary, sleeps: bool = False) -> None:
        self._policy = policy
        self._engine = engine
        self._way = way
        self._canary = canary
        self._sleeps = sleeps
        self.seconds = 0.0
        self._bytes = 0
        engine.prover = canary.prove

    async def rest(self) -> None:
        """Let the servers sleep, where they are to."""
        await self.wait()
        if self._sleeps:
            await self._engine.rest()

    async def wait(self) -> None:
        """The proof reads weights; samples waited for it already, where there were any.

        Raises:
            EngineError: a server does not compute with the weights that it was sent.
        """
        await self._engine.proven()

    async def publish(self, version: int) -> None:
        """Make `version` the one that the engine serves. Its proof goes on afterwards.

        Raises:
            EngineError: the engine did not take it.
            FileError: a folder cannot be written.
        """
        started = time.perf_counter()
        ref = await self._way.prepared(version)
        await self._engine.load(ref)
        self._policy.published(exact=self._engine.caps.exact_logprobs)
        self._bytes = self._way.taken(ref)
        self.seconds = time.perf_counter() - started

    def metrics(self) -> Metrics:
        """Of the version that is served: what its way took, and how far the engine's log-probs were off."""
        return {
            "sync/seconds": Last(self.seconds),
            "sync/bytes": Last(float(self._bytes)),
            "sync/verified": Last(float(self._canary.proofs)),
            "sync/logp_difference": Last(self._canary.difference),
            "sync/proof_seconds": Last(self._canary.seconds),
        }

    async def close(self) -> None:
        """Servers of somebody else's go on serving; the run's own end."""
        await self._engine.close()
        await self._way.close()
