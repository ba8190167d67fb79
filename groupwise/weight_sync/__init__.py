"""From a policy's new version to the engines that sample from it."""

from groupwise.weight_sync.in_process import InProcessSync, Unsynced

__all__ = ["InProcessSync", "Unsynced"]
