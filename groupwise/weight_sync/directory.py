"""A policy version to an engine in another process, through a folder that both see."""

from __future__ import annotations

import asyncio
import shutil
import time
from pathlib import Path

from groupwise.engines.http import HttpEngine
from groupwise.metrics import Last, Metrics
from groupwise.protocols import Policy
from groupwise.weight_sync.folder import write_weights

KEPT = 2
"""Versions whose folders stay: the one that is served, and the one before, until the newer one is confirmed."""


class DirectorySync:
    """Writes what training changes, and has the engine load it; both versions are known by number.

    Args:
        root: where the folders go: a disk, or memory such as `/dev/shm`, that the server sees under the same name.
    """

    def __init__(self, policy: Policy, engine: HttpEngine, root: Path) -> None:
        self._policy = policy
        self._engine = engine
        self._root = root.absolute()
        self._seconds = 0.0

    async def wait(self) -> None:
        """`publish` returns when everything is read."""

    async def publish(self, version: int) -> None:
        """Make `version` the one that the engine serves.

        Raises:
            EngineError: the engine did not take it, and still serves the version before.
            FileError: the folder cannot be written.
        """
        started = time.perf_counter()
        folder = self._root / f"version_{version:06d}"
        await asyncio.to_thread(write_weights, folder, list(self._policy.source()), version=version)
        await self._engine.load(version, folder)
        self._policy.published()
        for old in sorted(self._root.glob("version_*"))[:-KEPT]:
            shutil.rmtree(old, ignore_errors=True)
        self._seconds = time.perf_counter() - started

    def metrics(self) -> Metrics:
        """Of the last `publish`."""
        return {"sync/seconds": Last(self._seconds)}

    async def close(self) -> None:
        """The engine is told nothing: it goes on serving."""
        await self._engine.close()
