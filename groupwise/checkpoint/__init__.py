"""Checkpoints of any set of `Stateful` objects: atomic, verified, pruned, never pickled."""

from __future__ import annotations

from groupwise.checkpoint.store import (
    Manifest,
    find_latest,
    list_checkpoints,
    load_checkpoint,
    mark_best,
    read_manifest,
    read_part,
    save_checkpoint,
    step_of,
)

__all__ = [
    "Manifest",
    "find_latest",
    "list_checkpoints",
    "load_checkpoint",
    "mark_best",
    "read_manifest",
    "read_part",
    "save_checkpoint",
    "step_of",
]
