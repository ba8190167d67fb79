"""Whole weights in a folder for each version."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

from groupwise.engines.weights import WeightKind, WeightRef
from groupwise.protocols import Policy
from groupwise.weight_sync.folder import add_manifest, weights_bytes, write_weights
from groupwise.weight_sync.way import removed

KEPT = 2
"""Versions whose folders stay: the one that is served, and the one before, until the newer one is confirmed."""


class Directory:
    """Implements `groupwise.weight_sync.way.Way`.

    Args:
        root: where the folders go: a disk, or memory such as `/dev/shm`, that the servers see under the same name.
        kind: what the engine takes.
        leaves_none: nothing of `root` stays when this is closed; it may be memory.
    """

    def __init__(self, policy: Policy, root: Path, kind: WeightKind, *, leaves_none: bool = False) -> None:
        self._policy = policy
        self._root = root.absolute()
        self._kind: WeightKind = kind
        self._leaves_none = leaves_none

    async def prepared(self, version: int) -> WeightRef:
        """See `Way`."""
        folder = self.place(version)
        if self._kind == "tensors":
            await asyncio.to_thread(write_weights, folder, list(self._policy.source()), version=version)
        else:
            self._root.mkdir(parents=True, exist_ok=True)
            await self._policy.export(folder, merged=self._kind == "model")
            await asyncio.to_thread(add_manifest, folder, version=version)
        return WeightRef(version, folder, self._kind, weights_bytes(folder))

    def place(self, version: int) -> Path:
        """The folder of a version, written or not."""
        return self._root / f"version_{version:06d}"

    def taken(self, ref: WeightRef) -> int:
        """See `Way`."""
        versions = sorted(folder for folder in self._root.glob("version_*") if folder <= ref.folder)
        self.prune(first=versions[-KEPT:][0], last=ref.folder)
        return ref.bytes

    def prune(self, *, first: Path, last: Path) -> None:
        """Only folders from `first` to `last` stay: those behind it are of a run that was set back."""
        for folder in self._root.glob("version_*"):
            if not first <= folder <= last:
                shutil.rmtree(folder, ignore_errors=True)

    async def close(self) -> None:
        """See `Way`."""
        if self._leaves_none:
            await removed(self._root)
