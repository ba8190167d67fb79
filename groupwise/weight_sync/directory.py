"""A policy version to engines in other processes, through a folder that all of them see."""

from __future__ import annotations

import asyncio
import hashlib
import shutil
import time
from pathlib import Path

from groupwise.engines.http import HttpEngine
from groupwise.engines.weights import WeightKind, WeightRef
from groupwise.metrics import Last, Metrics
from groupwise.protocols import Policy
from groupwise.weight_sync.canary import Canary
from groupwise.weight_sync.folder import add_manifest, weights_bytes, write_weights

KEPT = 2
"""Versions whose folders stay: the one that is served, and the one before, until the newer one is confirmed."""


class DirectorySync:
    """Writes a version as the engine takes it, has every server load it, and proves that each computes with it.

    Args:
        root: where the folders go: a disk, or memory such as `/dev/shm`, that the servers see under the same name.
        canary: proves a server; samples of a version wait for it.
        sleeps: between the last sample of a step and the next version, servers give their memory back.
        leaves_none: nothing of `root` stays when this is closed; it may be memory.

    Attributes:
        seconds: that the last version took to be written and loaded.
    """

    def __init__(
        self,
        policy: Policy,
        engine: HttpEngine,
        root: Path,
        *,
        canary: Canary,
        sleeps: bool = False,
        leaves_none: bool = False,
    ) -> None:
        self._policy = policy
        self._engine = engine
        self._root = root.absolute()
        self._canary = canary
        self._sleeps = sleeps
        self._leaves_none = leaves_none
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
            FileError: the folder cannot be written.
        """
        started = time.perf_counter()
        ref = await self._written(version, self._engine.takes[0])
        await self._engine.load(ref)
        self._policy.published(exact=self._engine.caps.exact_logprobs)
        for old in sorted(self._root.glob("version_*"))[:-KEPT]:
            shutil.rmtree(old, ignore_errors=True)
        self.seconds, self._bytes = time.perf_counter() - started, ref.bytes

    async def _written(self, version: int, kind: WeightKind) -> WeightRef:
        folder = self._root / f"version_{version:06d}"
        if kind == "tensors":
            await asyncio.to_thread(write_weights, folder, list(self._policy.source()), version=version)
        else:
            self._root.mkdir(parents=True, exist_ok=True)
            await self._policy.export(folder, merged=kind == "model")
            await asyncio.to_thread(add_manifest, folder, version=version)
        return WeightRef(version, folder, kind, weights_bytes(folder))

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
        if self._leaves_none:
            await asyncio.to_thread(shutil.rmtree, self._root, ignore_errors=True)


def own_folder(parent: Path, run: Path) -> Path:
    """A run's own below a folder that others may use, too: the same one each time, and nobody else's."""
    place = str(run.absolute())
    return parent / f"{run.name}-{hashlib.blake2b(place.encode(), digest_size=4).hexdigest()}"
