"""Routes that SGLang and LMDeploy have in common: a group to broadcast weights to, and the buckets that come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from groupwise.engines.connection import Connection, Refused
from groupwise.engines.weights import Entry, Meeting
from groupwise.errors import EngineError


async def joined(server: Connection, meeting: Meeting) -> None:
    """Every worker of the server comes to the group.

    Raises:
        EngineError: it does not.
    """
    body = {
        "master_address": meeting.host,
        "master_port": meeting.port,
        "rank_offset": 1,
        "world_size": meeting.size,
        "group_name": meeting.name,
        "backend": meeting.backend,
    }
    try:
        await server.post("/init_weights_update_group", body, seconds=meeting.seconds)
    except Refused as refused:
        raise EngineError(
            f"{server.url} does not join a group: {refused.said}; with NCCL, both environments need the same version "
            "of it, and the engine a GPU that is not the policy's"
        ) from refused


def described(bucket: Sequence[Entry], *, group: str | None) -> dict[str, Any]:
    """What comes next, as `/update_weights_from_distributed` takes it."""
    assert group is not None, "a bucket is sent to a group"
    return {
        "names": [name for name, *_ in bucket],
        "dtypes": [kind for _, kind, *_ in bucket],
        "shapes": [shape for _, _, shape, _ in bucket],
        "group_name": group,
        "load_format": "flattened_bucket",
    }
