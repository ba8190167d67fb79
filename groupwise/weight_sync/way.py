"""How a version travels: one object for each of the ways that `rollout.weights_by` names."""

from __future__ import annotations

import asyncio
import hashlib
import shutil
from pathlib import Path
from typing import Protocol

from groupwise.engines.weights import WeightRef
from groupwise.protocols import Policy
from groupwise.weight_sync.folder import add_manifest


class Way(Protocol):
    """Makes a version ready for servers that take it at the same time, each as often as it has to."""

    async def prepared(self, version: int) -> WeightRef:
        """The policy as it is now.

        Raises:
            FileError: a folder cannot be written.
        """
        ...

    def taken(self, ref: WeightRef) -> int:
        """Every server has it: let go of what is not needed any more. Returns the bytes that travelled."""
        ...

    async def close(self) -> None: ...


class FirstFolder:
    """A whole model that servers of the run's own are started with, and started again, where weights travel otherwise:
    the version that was published first. They get the newest one before a sample is asked of them.

    Args:
        needed: there are such servers.
        leaves_none: nothing of `root` stays when this is closed.
    """

    def __init__(self, policy: Policy, root: Path, *, needed: bool, leaves_none: bool = False) -> None:
        self._policy = policy
        self._leaves_none = leaves_none
        self.folder = root.absolute() / "start"
        self._needed = needed

    async def written(self, version: int) -> Path:
        """The folder, which is written once."""
        if self._needed:
            self._needed = False
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            await self._policy.export(self.folder)
            await asyncio.to_thread(add_manifest, self.folder, version=version)
        return self.folder

    async def close(self) -> None:
        """It goes where it is to."""
        if self._leaves_none:
            await removed(self.folder.parent)


def own_folder(parent: Path, run: Path) -> Path:
    """A run's own below a folder that others may use, too: the same one each time, and nobody else's."""
    place = str(run.absolute())
    return parent / f"{run.name}-{hashlib.blake2b(place.encode(), digest_size=4).hexdigest()}"


async def removed(folder: Path) -> None:
    """Nothing of it stays."""
    await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
