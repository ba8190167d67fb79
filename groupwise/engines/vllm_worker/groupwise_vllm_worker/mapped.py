"""Weights that lie in the trainer's memory, and are read there: a GPU's through CUDA IPC, a CPU's through a file in
memory. What says where they are is JSON."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.multiprocessing import reductions

from .fold import folds


def digest_of(entries: Sequence[Any]) -> str:
    """Of a list of tensors as it is sent, so that none is missing where it arrives."""
    return hashlib.blake2b(json.dumps(entries).encode(), digest_size=16).hexdigest()


def check_list(entries: Sequence[Any], digest: str) -> None:
    """
    Raises:
        ValueError: it is not the list that was sent.
    """
    if (found := digest_of(entries)) != digest:
        raise ValueError(f"the list of {len(entries)} tensors is not the one that was sent ({found}, not {digest})")


def mapped(storages: Sequence[dict[str, Any]], entries: Sequence[Any], digest: str) -> dict[str, Tensor]:
    """Every tensor, read where it lies, and compared with its checksum.

    Args:
        storages: a file and its `bytes`, or what `rebuild_cuda_tensor` of torch takes, with the GPU's UUID.
        entries: name, type, shape, strides, storage, byte where it begins, checksum.

    Raises:
        ValueError: one is not what was sent, or cannot be reached from here.
    """
    check_list(entries, digest)
    opened: list[Tensor] = [_opened(storage) for storage in storages]
    found = {entry[0]: _part(opened[int(entry[4])], entry) for entry in entries}
    for (name, *_, wanted), got in zip(entries, folds(found.values()), strict=True):
        if got != wanted:
            raise ValueError(f"{name} has the checksum {got}, and {wanted} was sent")
    return found


def _part(whole: Tensor, entry: Sequence[Any]) -> Tensor:
    """A tensor in the bytes of its storage."""
    name, kind, shape, strides, _, begin, _ = entry
    dtype = dtype_of(kind)
    extent = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) if all(shape) else 0
    end = begin + extent * dtype.itemsize
    if end > whole.numel():
        raise ValueError(f"{name} ends beyond its storage of {whole.numel()} bytes")
    part = whole[begin:end].view(dtype)
    return part.as_strided(shape, strides, int(part.storage_offset()))


def dtype_of(name: str) -> torch.dtype:
    """
    Raises:
        ValueError: it is none of torch's.
    """
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"{name!r} is no type of torch's")
    return found


def _opened(storage: dict[str, Any]) -> Tensor:
    """Its bytes, `[N]`."""
    if "file" in storage:
        file, size = Path(storage["file"]), int(storage["bytes"])
        if not file.is_file() or file.stat().st_size < size:  # reading beyond its end would end the process
            raise ValueError(f"{file} is not there with {size} bytes: is the trainer on this machine?")
        return torch.from_file(str(file), shared=False, size=size, dtype=torch.uint8)
    rebuild = cast("Callable[..., Tensor]", reductions.rebuild_cuda_tensor)  # pyright: ignore[reportUnknownMemberType]
    return rebuild(
        Tensor,
        torch.Size([storage["bytes"]]),
        (1,),
        storage["begin"],
        torch.UntypedStorage,
        torch.uint8,
        _device(storage["uuid"]),
        bytes.fromhex(storage["handle"]),
        storage["storage_bytes"],
        storage["storage_begin"],
        False,
        bytes.fromhex(storage["counter"]),
        storage["counter_begin"],
        bytes.fromhex(storage["event"]),
        storage["event_needed"],
    )


def _device(uuid: str) -> int:
    """The number that this process has for a GPU."""
    seen = [uuid_of(number) for number in range(torch.cuda.device_count())]
    if uuid not in seen:
        raise ValueError(f"the policy is on GPU {uuid}, which this engine does not see ({', '.join(seen) or 'no GPU'})")
    return seen.index(uuid)


def uuid_of(number: int) -> str:
    """A GPU's name, the same in every process."""
    return str(cast(Any, torch.cuda).get_device_properties(number).uuid)


def parts_of(flat: Tensor, entries: Sequence[Any]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a flat one, `[N]` bytes, one after another without a gap.

    Args:
        entries: name, type, shape, checksum.
    """
    begin = 0
    for name, kind, shape, _ in entries:
        dtype = dtype_of(kind)
        end = begin + torch.Size(shape).numel() * dtype.itemsize
        yield name, flat[begin:end].view(dtype).reshape(shape)
        begin = end
