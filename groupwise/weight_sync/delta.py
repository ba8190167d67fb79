"""What changed since the version before, in a folder for each version: for disks and networks that are slow.

In bfloat16 most values stay what they were after a small step. A folder has the places and the values of the others,
and the digest of every whole tensor; who has the version before makes this one of it. Whoever does not begins with the
last whole version and lays the folders since over it, one after another. So that these stay few, the next version is
whole again once the changes since would be as many bytes as it is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from groupwise.engines.vllm_worker.groupwise_vllm_worker.folder import CHANGES, changes_of, fact_of
from groupwise.engines.weights import WeightKind, WeightRef
from groupwise.protocols import Policy
from groupwise.weight_sync.directory import KEPT, Directory
from groupwise.weight_sync.folder import FORMAT, weights_bytes, write_whole

Named = Sequence[tuple[str, Tensor]]


class Delta:
    """Implements `groupwise.weight_sync.way.Way`. It holds a copy of the last version in the host's memory.

    Args:
        root, kind, leaves_none: as for `Directory`.
    """

    def __init__(self, policy: Policy, root: Path, kind: WeightKind, *, leaves_none: bool = False) -> None:
        self._policy = policy
        self._whole = Directory(policy, root, kind, leaves_none=leaves_none)
        self._kind: WeightKind = kind
        self._sent: dict[str, Tensor] = {}
        self._facts: dict[str, dict[str, Any]] = {}
        self._first: WeightRef | None = None
        self._chain: list[Path] = []
        self._chain_bytes = 0
        self._taken = False
        self._begins: list[Path] = []
        """Of each version that was prepared, the whole one that it begins with; the newest last."""

    async def prepared(self, version: int) -> WeightRef:
        """See `Way`."""
        tensors = list(self._policy.source()) if self._kind == "tensors" else await self._policy.weights()
        first, taken, self._taken = self._first, self._taken, False
        if first is None or not taken or not await asyncio.to_thread(self._written, version, tensors):
            first = self._first = await self._whole.prepared(version)
            self._chain, self._chain_bytes = [], 0
            await asyncio.to_thread(self._remember, tensors)
        self._begins = [*self._begins[-KEPT + 1 :], first.folder]
        size = weights_bytes(self._chain[-1]) if self._chain else first.bytes
        return WeightRef(version, first.folder, self._kind, size, changes=tuple(self._chain))

    def _remember(self, tensors: Named) -> None:
        self._sent = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors}
        self._facts = {name: fact_of(tensor) for name, tensor in self._sent.items()}

    def _written(self, version: int, tensors: Named) -> bool:
        """The changes, where they are shorter than a whole version would be."""
        assert self._first is not None, "changes are of a version"
        new = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors}
        if {n: (t.shape, t.dtype) for n, t in new.items()} != {n: (t.shape, t.dtype) for n, t in self._sent.items()}:
            return False
        changes: dict[str, Tensor] = {}
        changed: list[str] = []
        for name, tensor in new.items():
            if found := changes_of(name, self._sent[name], tensor):
                changes |= found
                changed.append(name)
        size = sum(tensor.numel() * tensor.element_size() for tensor in changes.values())
        if self._chain_bytes + size >= self._first.bytes:
            return False
        for name in changed:
            self._sent[name].copy_(new[name])
            self._facts[name] = fact_of(self._sent[name])
        folder = self._whole.place(version)
        manifest = {"format": FORMAT, "version": version, "base": self._base(), "tensors": self._facts}
        write_whole(folder, CHANGES, changes, manifest)
        self._chain.append(folder)
        self._chain_bytes += size
        return True

    def _base(self) -> int:
        assert self._first is not None, "changes are of a version"
        before = self._chain[-1] if self._chain else self._first.folder
        return int(before.name.rpartition("_")[2])

    def taken(self, ref: WeightRef) -> int:
        """The folders of the newest two versions stay, with all that these are made of."""
        self._taken = True  # what was refused may be damaged, and nothing is laid over it
        self._whole.prune(first=min(self._begins), last=ref.newest)
        return ref.bytes

    async def close(self) -> None:
        """See `Way`."""
        self._sent.clear()
        await self._whole.close()
