"""A version of the policy on its way to an engine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

WeightKind: TypeAlias = Literal["tensors", "model", "adapter"]
"""What a folder holds: tensors by the policy's own names; a Hugging Face model; an adapter beside its base."""


@dataclass(frozen=True, slots=True)
class WeightRef:
    """Weights in a folder that trainer and engine see under one name, and whose manifest names every byte.

    Attributes:
        bytes: of its weights.

    Example:
        WeightRef(17, Path("/dev/shm/run/version_000017"), "model", bytes=1_192_135_096)
    """

    version: int
    folder: Path
    kind: WeightKind
    bytes: int
