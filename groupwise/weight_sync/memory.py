"""Weights that servers on this machine read out of this process's memory.

On a GPU they are the policy's own tensors: nothing is copied, but for those that have another form in a folder than in
memory. On a CPU they are written into one file in memory (`/dev/shm`), as large as the model, of which there is never
more than one.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.multiprocessing import reductions

from groupwise.engines.vllm_worker.groupwise_vllm_worker.fold import folds
from groupwise.engines.vllm_worker.groupwise_vllm_worker.mapped import digest_of, uuid_of
from groupwise.engines.weights import Memory, WeightRef
from groupwise.files import writing
from groupwise.protocols import Policy
from groupwise.weight_sync.way import FirstFolder, removed

_ALIGNED = 64
Named = Sequence[tuple[str, Tensor]]


class SharedMemory:
    """Implements `groupwise.weight_sync.way.Way`.

    Args:
        first: what servers of the run's own start with.
        place: folder for the file, in memory; made when it is needed, and removed at the end.
    """

    def __init__(self, policy: Policy, first: FirstFolder, place: Path) -> None:
        self._policy = policy
        self._first = first
        self._place = place.absolute()
        self._held: Named = ()

    async def prepared(self, version: int) -> WeightRef:
        """See `Way`."""
        folder = await self._first.written(version)
        self._held = await self._policy.weights()
        memory = await asyncio.to_thread(self._told, self._held, version)
        size = sum(tensor.numel() * tensor.element_size() for _, tensor in self._held)
        return WeightRef(version, folder, "model", size, memory=memory)

    def _told(self, tensors: Named, version: int) -> Memory:
        on_gpu = {tensor.device.type == "cuda" for _, tensor in tensors}
        assert len(on_gpu) == 1, "a policy's weights are on GPUs or on the CPU"
        if on_gpu == {True}:
            return told_of_gpus(tensors)
        with writing(self._place):
            self._place.mkdir(parents=True, exist_ok=True, mode=0o700)
            for old in self._place.glob("version_*"):
                old.unlink()
            return write_shared(self._place / f"version_{version:06d}", tensors)

    def taken(self, ref: WeightRef) -> int:
        """Nothing goes: a server that is lost reads it again."""
        return ref.bytes

    async def close(self) -> None:
        """See `Way`."""
        self._held = ()
        await removed(self._place)
        await self._first.close()


def write_shared(file: Path, tensors: Named) -> Memory:
    """Write one file of them all, to be mapped.

    Raises:
        OSError: there is no room.
    """
    begins, size = list[int](), 0
    for _, tensor in tensors:
        begins.append(size)
        size += -(-tensor.numel() * tensor.element_size() // _ALIGNED) * _ALIGNED
    size = max(size, _ALIGNED)
    descriptor = os.open(file, os.O_CREAT | os.O_RDWR | os.O_EXCL, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, size)  # writing where there is no room would end the process
    finally:
        os.close(descriptor)
    whole = torch.from_file(str(file), shared=True, size=size, dtype=torch.uint8)
    placed: list[Tensor] = []
    for begin, (_, tensor) in zip(begins, tensors, strict=True):
        part = whole[begin : begin + tensor.numel() * tensor.element_size()].view(tensor.dtype)
        placed.append(part.view(tensor.shape).copy_(tensor))
    # The checksums are of the policy's tensors, so that a fault of writing is found, too.
    named = [(name, tensor) for (name, _), tensor in zip(tensors, placed, strict=True)]
    return _memory(named, [0] * len(named), [{"file": str(file), "bytes": size}], folds(t for _, t in tensors))


def told_of_gpus(tensors: Named) -> Memory:
    """Where tensors on this machine's GPUs lie, for processes that use the same ones."""
    storages: list[Mapping[str, Any]] = []
    numbers: list[int] = []
    known: dict[tuple[torch.device, int], int] = {}
    for _, tensor in tensors:
        storage = tensor.untyped_storage()
        key = (tensor.device, storage.data_ptr())
        if key not in known:
            known[key] = len(storages)
            storages.append(_handle(torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)))
        numbers.append(known[key])
    checksums = folds(tensor for _, tensor in tensors)
    for device in {tensor.device for _, tensor in tensors}:
        torch.cuda.synchronize(device)
    return _memory(tensors, numbers, storages, checksums)


def _handle(whole: Tensor) -> dict[str, Any]:
    """What `rebuild_cuda_tensor` takes, in JSON; `whole` is all bytes of a storage."""
    _, arguments = cast("tuple[Any, tuple[Any, ...]]", reductions.reduce_tensor(whole))
    (_, size, _, begin, _, _, device, handle, storage_bytes, storage_begin, _, *rest) = arguments
    counter, counter_begin, event, event_needed = rest
    return {
        "bytes": size[0],
        "begin": begin,
        "uuid": uuid_of(device),
        "handle": handle.hex(),
        "storage_bytes": storage_bytes,
        "storage_begin": storage_begin,
        "counter": counter.hex(),
        "counter_begin": counter_begin,
        "event": event.hex(),
        "event_needed": event_needed,
    }


def _memory(
    tensors: Named, numbers: Sequence[int], storages: Sequence[Mapping[str, Any]], checksums: Sequence[str]
) -> Memory:
    entries = [
        [
            name,
            str(tensor.dtype).removeprefix("torch."),
            list(tensor.shape),
            list(tensor.stride()),
            number,
            tensor.storage_offset() * tensor.element_size(),
            checksum,
        ]
        for (name, tensor), number, checksum in zip(tensors, numbers, checksums, strict=True)
    ]
    return Memory(storages, entries, digest_of(entries))
