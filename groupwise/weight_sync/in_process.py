"""One process, one set of weights: a new version is a number, and nothing is copied."""

from __future__ import annotations

from typing import Protocol

from groupwise.metrics import Metrics
from groupwise.protocols import Policy


class VersionedEngine(Protocol):
    """An engine that samples from the policy's own module."""

    async def update_weights(self, version: int) -> None: ...


class InProcessSync:
    """Publishes to an engine that runs the policy's own module."""

    def __init__(self, policy: Policy, engine: VersionedEngine) -> None:
        self._policy = policy
        self._engine = engine

    async def rest(self) -> None:
        """What the engine keeps is the policy's own."""

    async def wait(self) -> None:
        """Nothing is under way between calls."""

    async def publish(self, version: int) -> None:
        """Make `version` the one that the engine serves.

        Raises:
            EngineError: samples of the old version are still running.
        """
        await self._engine.update_weights(version)
        self._policy.published()

    def metrics(self) -> Metrics:
        """There is nothing to tell."""
        return {}

    async def close(self) -> None:
        """Nothing is held."""


class Unsynced:
    """No engine samples from the policy, as in supervised training."""

    async def rest(self) -> None:
        """Nobody samples."""

    async def wait(self) -> None:
        """Nothing is under way."""

    async def publish(self, version: int) -> None:
        """Nobody asks for it."""

    def metrics(self) -> Metrics:
        """There is nothing to tell."""
        return {}

    async def close(self) -> None:
        """Nothing is held."""
