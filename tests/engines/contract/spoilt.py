"""What goes wrong with weights on their way: of versions that are named, one tensor has another bit, or is missing."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from groupwise.engines.weights import WeightRef
from groupwise.weight_sync.broadcast import Broadcasting
from groupwise.weight_sync.delta import Delta
from groupwise.weight_sync.memory import SharedMemory


def spoilt_memory(monkeypatch: pytest.MonkeyPatch, versions: Collection[int], missing: bool) -> None:
    real = SharedMemory.prepared

    async def prepared(self: SharedMemory, version: int) -> WeightRef:
        ref = await real(self, version)
        if version in versions:
            assert ref.memory is not None
            if missing:
                return replace(ref, memory=replace(ref.memory, entries=ref.memory.entries[1:]))
            flip(Path(ref.memory.storages[0]["file"]), 4096)
        return ref

    monkeypatch.setattr(SharedMemory, "prepared", prepared)


def spoilt_broadcast(monkeypatch: pytest.MonkeyPatch, versions: Collection[int], missing: bool) -> None:
    real = Broadcasting.prepared

    async def prepared(self: Broadcasting, version: int) -> WeightRef:
        ref = await real(self, version)
        if version in versions:
            parcel = self._newest
            assert parcel is not None
            if missing:
                parcel.buckets[0], parcel.tensors[0] = parcel.buckets[0][1:], parcel.tensors[0][1:]
            else:
                parcel.tensors[0][-1] = parcel.tensors[0][-1] + 1
        return ref

    monkeypatch.setattr(Broadcasting, "prepared", prepared)


def spoilt_changes(monkeypatch: pytest.MonkeyPatch, versions: Collection[int], missing: bool) -> None:
    real = Delta.prepared

    async def prepared(self: Delta, version: int) -> WeightRef:
        ref = await real(self, version)
        if version in versions:
            [file] = ref.newest.glob("*.safetensors")
            if missing:
                tensors = load_file(file)
                tensors.pop(sorted(tensors)[0])
                save_file(tensors, file)
            else:
                flip(file, file.stat().st_size - 1)
        return ref

    monkeypatch.setattr(Delta, "prepared", prepared)


def flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


SPOILT: dict[str, Callable[[pytest.MonkeyPatch, Collection[int], bool], None]] = {
    "ipc": spoilt_memory,
    "nccl": spoilt_broadcast,
    "delta": spoilt_changes,
}
"""By way: of these versions, one tensor is missing, or has another bit."""
