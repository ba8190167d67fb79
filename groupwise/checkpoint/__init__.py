"""Checkpoints of any set of `Stateful` objects: atomic, verified, pruned, never pickled."""

from __future__ import annotations

from groupwise.checkpoint.folders import find_latest, list_checkpoints, mark_best, step_of
from groupwise.checkpoint.store import (
    Manifest,
    Verified,
    find_verified,
    load_checkpoint,
    read_manifest,
    read_part,
    save_checkpoint,
    verify_checkpoint,
)

__all__ = [
    "Manifest",
    "Verified",
    "find_latest",
    "find_verified",
    "list_checkpoints",
    "load_checkpoint",
    "mark_best",
    "read_manifest",
    "read_part",
    "save_checkpoint",
    "step_of",
    "verify_checkpoint",
]
