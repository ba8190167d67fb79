"""Groups that SGLang and LMDeploy let a trainer broadcast weights to, made as their `init_custom_process_group` makes
them, with torch's own calls. On a CPU the backend is gloo."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

TIMEOUT = timedelta(seconds=60)


class Groups:
    """Those of one server, whose only worker has the first rank that it is offered."""

    def __init__(self) -> None:
        self._groups: dict[str, Any] = {}

    async def init(self, body: Mapping[str, Any]) -> tuple[bool, str]:
        if body["group_name"] in self._groups:
            return False, f"group {body['group_name']!r} already initialized"
        try:
            self._groups[body["group_name"]] = await asyncio.to_thread(_joined, body)
        except Exception as error:  # as the engines do
            return False, f"Failed to initialize custom process group: {error}."
        return True, "Succeeded to initialize custom process group."

    def __contains__(self, name: str) -> bool:
        return name in self._groups

    async def receive(self, body: Mapping[str, Any], *, typed: bool) -> dict[str, Tensor]:
        """One bucket.

        Args:
            typed: as elements of its type, as LMDeploy does; as bytes, as SGLang does.
        """
        return await asyncio.to_thread(_received, self._groups[body["group_name"]], body, typed)


def _joined(body: Mapping[str, Any]) -> Any:
    from torch.distributed.distributed_c10d import (
        Backend,
        PrefixStore,
        _new_process_group_helper,
        _world,
        rendezvous,
    )

    size, name = body["world_size"], body["group_name"]
    method = f"tcp://{body['master_address']}:{body['master_port']}"
    store, rank, size = next(iter(rendezvous(method, body["rank_offset"], size, timeout=TIMEOUT)))
    store.set_timeout(TIMEOUT)
    store = PrefixStore(name, store)
    group, _ = _new_process_group_helper(
        size, rank, [], Backend(body["backend"]), store, group_name=name, backend_options=None, timeout=TIMEOUT
    )
    _world.pg_group_ranks[group] = {number: number for number in range(size)}
    return group


def _received(group: Any, body: Mapping[str, Any], typed: bool) -> dict[str, Tensor]:
    assert body["load_format"] == "flattened_bucket"
    dtypes = [getattr(torch, each) for each in body["dtypes"]]
    shapes = [torch.Size(each) for each in body["shapes"]]
    assert not typed or len(set(dtypes)) == 1, "All tensors should have same dtype"
    sizes = [shape.numel() * dtype.itemsize for shape, dtype in zip(shapes, dtypes, strict=True)]
    flat = torch.empty(sum(sizes), dtype=torch.uint8)
    dist.broadcast(flat.view(dtypes[0]) if typed else flat, src=0, group=group)
    parts = zip(body["names"], flat.split(sizes), dtypes, shapes, strict=True)
    return {name: part.view(dtype).reshape(shape) for name, part, dtype, shape in parts}
