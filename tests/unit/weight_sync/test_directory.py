"""Which folders stay."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from groupwise.protocols import Policy
from groupwise.weight_sync.directory import Directory


class Weights:
    def source(self) -> list[tuple[str, Tensor]]:
        return [("w", torch.ones(3))]


def test_the_newest_two_stay_and_those_of_a_run_that_was_set_back_go(tmp_path: Path) -> None:
    way = Directory(cast(Policy, Weights()), tmp_path, "tensors")

    def stay(version: int) -> list[str]:
        ref = asyncio.run(way.prepared(version))
        assert way.taken(ref) == ref.bytes
        return sorted(folder.name for folder in tmp_path.iterdir())

    assert stay(1) == ["version_000001"]
    assert stay(2) == ["version_000001", "version_000002"]
    assert stay(3) == ["version_000002", "version_000003"]
    assert stay(4) == ["version_000003", "version_000004"]
    assert stay(2) == ["version_000002"]  # set back to a checkpoint: what it serves stays, and not what it had reached
    assert stay(3) == ["version_000002", "version_000003"]
