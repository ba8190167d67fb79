"""Weights in memory that others read: told in JSON, compared before they are used, and never more than one file."""

from __future__ import annotations

import asyncio
import copy
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from groupwise.engines.vllm_worker.groupwise_vllm_worker.mapped import mapped
from groupwise.engines.weights import Memory
from groupwise.errors import FileError
from groupwise.protocols import Policy
from groupwise.weight_sync.memory import SharedMemory, write_shared
from groupwise.weight_sync.way import FirstFolder


def tensors() -> list[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(6, 10, generator=generator)
    return [
        ("a", torch.randn(3, 5, generator=generator).bfloat16()),
        ("turned", whole.T),
        ("part", whole[2:4, 1:7]),
        ("one", torch.tensor(4.5)),
        ("none", torch.zeros(0, 4)),
        ("odd", torch.arange(7, dtype=torch.int8)),
    ]


def told(memory: Memory) -> dict[str, Any]:
    """As it is after a way through JSON."""
    return json.loads(json.dumps(asdict(memory)))


def test_what_is_read_is_what_was_told(tmp_path: Path) -> None:
    given = tensors()
    found = mapped(**told(write_shared(tmp_path / "w", given)))
    assert list(found) == [name for name, _ in given]
    for name, tensor in given:
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    assert os.stat(tmp_path / "w").st_mode & 0o777 == 0o600


def flipped(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def test_a_byte_that_changed_is_found_before_anything_is_given(tmp_path: Path) -> None:
    memory = told(write_shared(tmp_path / "w", tensors()))
    begin = next(entry[5] for entry in memory["entries"] if entry[0] == "part")
    flipped(tmp_path / "w", begin + 5)
    with pytest.raises(ValueError, match="part has the checksum"):
        mapped(**memory)


def without_one(memory: dict[str, Any]) -> None:
    del memory["entries"][1]


def other_shape(memory: dict[str, Any]) -> None:
    memory["entries"][0][2] = [5, 3]


def other_file(memory: dict[str, Any]) -> None:
    memory["storages"][0]["file"] += "x"


def longer(memory: dict[str, Any]) -> None:
    memory["storages"][0]["bytes"] += 10**9


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (without_one, "list of 5 tensors is not the one that was sent"),
        (other_shape, "is not the one that was sent"),
        (other_file, "is the trainer on this machine"),
        (longer, "is the trainer on this machine"),
    ],
)
def test_a_list_that_changed_and_a_file_that_is_not_there_are_said(tmp_path: Path, spoil: Any, said: str) -> None:
    memory = told(write_shared(tmp_path / "w", tensors()))
    spoil(memory)
    with pytest.raises(ValueError, match=said):
        mapped(**memory)


def test_nobody_reads_beyond_a_storage(tmp_path: Path) -> None:
    from groupwise.engines.vllm_worker.groupwise_vllm_worker.mapped import digest_of

    memory = told(write_shared(tmp_path / "w", tensors()))
    memory["entries"][0][5] = 10**6
    memory["digest"] = digest_of(memory["entries"])
    with pytest.raises(ValueError, match="a ends beyond its storage"):
        mapped(**memory)


class Weights:
    def __init__(self) -> None:
        self.tensors = tensors()

    async def weights(self) -> Sequence[tuple[str, Tensor]]:
        return self.tensors


def test_the_file_of_a_version_goes_when_the_next_comes_and_who_has_it_open_reads_on(tmp_path: Path) -> None:
    weights = Weights()
    policy = cast(Policy, weights)
    way = SharedMemory(policy, FirstFolder(policy, tmp_path, needed=False), tmp_path / "shm")

    async def play() -> None:
        first = await way.prepared(1)
        assert way.taken(first) == first.bytes == sum(t.numel() * t.element_size() for _, t in weights.tensors)
        assert first.memory is not None
        held = mapped(**told(first.memory))
        before = copy.deepcopy(weights.tensors)
        for _, tensor in weights.tensors:
            tensor.add_(1)
        second = await way.prepared(2)
        assert [file.name for file in (tmp_path / "shm").iterdir()] == ["version_000002"]
        assert all(torch.equal(held[name], tensor) for name, tensor in before)
        assert second.memory is not None
        fresh = mapped(**told(second.memory))
        assert all(torch.equal(fresh[name], tensor) for name, tensor in weights.tensors)
        await way.close()
        assert not (tmp_path / "shm").exists()
        assert not (tmp_path / "start").exists()

    asyncio.run(play())


def test_memory_that_is_full_is_an_error_and_not_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    weights = Weights()
    policy = cast(Policy, weights)
    way = SharedMemory(policy, FirstFolder(policy, tmp_path, needed=False), tmp_path / "shm")
    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(FileError, match="shm"):
        asyncio.run(way.prepared(1))
