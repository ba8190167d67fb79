"""The way that a config names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from groupwise.config import RolloutConfig
from groupwise.engines.http import HttpEngine
from groupwise.errors import ConfigError
from groupwise.protocols import Policy
from groupwise.weight_sync.broadcast import Broadcasting
from groupwise.weight_sync.delta import Delta
from groupwise.weight_sync.directory import Directory
from groupwise.weight_sync.memory import SharedMemory
from groupwise.weight_sync.way import FirstFolder, Way, own_folder

_IN_MEMORY = Path("/dev/shm")


def way_of(
    rollout: RolloutConfig, policy: Policy, engine: HttpEngine, root: Path, *, adapter: bool, leaves_none: bool
) -> Way:
    """How `rollout.weights_by` has weights travel.

    Args:
        root: folder for what is written.
        adapter: one is trained.
        leaves_none: nothing of `root` stays in the end.

    Raises:
        ConfigError: an adapter takes no other way than a directory.
    """
    name = rollout.weights_by
    if adapter and name != "directory":
        raise ConfigError(f"rollout.weights_by = {name!r}: an adapter travels by 'directory'; leave it out")
    kind = engine.takes[0]
    first = FirstFolder(policy, root, needed=engine.starts, leaves_none=leaves_none)
    ways: dict[str, Callable[[], Way]] = {
        "directory": lambda: Directory(policy, root, kind, leaves_none=leaves_none),
        "delta": lambda: Delta(policy, root, kind, leaves_none=leaves_none),
        "ipc": lambda: SharedMemory(policy, first, own_folder(_IN_MEMORY, root)),
        "nccl": lambda: Broadcasting(policy, first),
    }
    return ways[name]()
