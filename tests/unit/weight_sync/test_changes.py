"""Changes make the new tensor of the old one bit for bit; chains of them stay bounded; what is damaged is refused."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from groupwise.engines.vllm_worker.groupwise_vllm_worker.folder import CHANGES, MANIFEST, apply, changes_of
from groupwise.engines.vllm_worker.groupwise_vllm_worker.worker import changed
from groupwise.errors import DataError
from groupwise.protocols import Policy
from groupwise.weight_sync.delta import Delta
from groupwise.weight_sync.folder import read_weights

DTYPES = [torch.bfloat16, torch.float32, torch.float16, torch.int8]


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


@given(st.sampled_from(DTYPES), st.integers(1, 70_000), st.lists(st.integers(0, 10**6), max_size=6), st.integers(0, 9))
def test_changes_make_the_new_of_the_old(dtype: torch.dtype, size: int, places: list[int], seed: int) -> None:
    old = torch.randn(size, generator=torch.Generator().manual_seed(seed)).mul(9).to(dtype)
    new = old.clone()
    for place in places:
        new[place % size] = -new[place % size] if dtype != torch.int8 else new[place % size] + 1
    found = changes_of("w", old, new)
    if torch.equal(bits(old), bits(new)):
        assert found == {}
    made = old.clone()
    lay(found, made)
    assert torch.equal(bits(made), bits(new))
    assert sum(bits(each).numel() for each in found.values()) <= bits(new).numel()


def lay(changes: dict[str, Tensor], target: Tensor) -> None:
    with tempfile.TemporaryDirectory() as folder:
        save_file(changes, Path(folder) / CHANGES)
        apply(Path(folder), {"w": target})


def test_what_is_no_number_and_the_sign_of_zero_are_changes_as_any_other() -> None:
    old = torch.zeros(4096)
    new = old.clone()
    new[7], new[4000] = float("nan"), -0.0
    found = changes_of("w", old, new)
    assert found["w#gaps"].tolist() == [8, 3993]
    made = old.clone()
    lay(found, made)
    assert torch.equal(bits(made), bits(new))


def test_where_most_changed_the_whole_tensor_is_shorter() -> None:
    old = torch.randn(1000).bfloat16()
    new = old.clone()
    new[:500] += 1
    assert changes_of("w", old, new).keys() == {"w"}
    new = old.clone()
    new[:400] += 1
    assert changes_of("w", old, new).keys() == {"w#gaps", "w#values"}


def test_far_places_have_wide_distances() -> None:
    old = torch.zeros(200_000, dtype=torch.bfloat16)
    new = old.clone()
    new[[0, 150_000]] = 1.0
    found = changes_of("w", old, new)
    assert found["w#gaps"].dtype == torch.int64
    made = old.clone()
    lay(found, made)
    assert torch.equal(made, new)


@pytest.mark.parametrize(
    "changes",
    [
        {"w#gaps": torch.tensor([11], dtype=torch.int16), "w#values": torch.zeros(1, dtype=torch.int32)},
        {"w#gaps": torch.tensor([0], dtype=torch.int16), "w#values": torch.zeros(1, dtype=torch.int32)},
        {"w#gaps": torch.tensor([1, 1], dtype=torch.int16), "w#values": torch.zeros(1, dtype=torch.int32)},
        {"w": torch.zeros(9)},
        {"w": torch.zeros(10, dtype=torch.float64)},
    ],
    ids=["beyond", "before", "other length", "other shape", "other type"],
)
def test_changes_that_do_not_fit_are_refused(changes: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match="w"):
        lay(changes, torch.zeros(10))


class Weights:
    """A policy that is a few tensors."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.tensors = {name: torch.randn(8192, generator=generator).bfloat16() for name in ("a", "b", "c")}

    def source(self) -> Sequence[tuple[str, Tensor]]:
        return list(self.tensors.items())

    def change(self, count: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for tensor in self.tensors.values():
            tensor[torch.randperm(8192, generator=generator)[:count]] += 1

    def now(self) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in self.tensors.items()}


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def published(root: Path, counts: Sequence[int]) -> list[tuple[Any, dict[str, Tensor], set[str]]]:
    """Each version's reference, its weights, and the folders that stay."""
    weights = Weights()
    way = Delta(cast(Policy, weights), root, "tensors")
    found = []
    for version, count in enumerate(counts):
        weights.change(count, version)
        ref = asyncio.run(way.prepared(version))
        assert way.taken(ref) == ref.bytes
        found.append((ref, weights.now(), {folder.name for folder in root.iterdir()}))
    return found


def test_a_chain_gives_each_version_to_whoever_begins_anywhere(tmp_path: Path) -> None:
    held: tuple[int, dict[str, Tensor]] | None = None
    weights = Weights()
    way = Delta(cast(Policy, weights), tmp_path, "tensors")
    for version, count in enumerate([0, 30, 0, 500, 1, 2000, 3]):
        weights.change(count, version)
        ref = asyncio.run(way.prepared(version))
        way.taken(ref)
        folders = [ref.folder, *(ref.changes or ())]
        assert ref.newest == folders[-1] == tmp_path / f"version_{version:06d}"
        afresh = changed(folders, version, None)
        tensors = changed(folders, version, held)
        assert same(afresh, weights.now())
        assert same(tensors, weights.now())
        held = version, tensors
        served = read_weights(ref.newest, version=version, held=None)
        assert same(served, weights.now())


def test_only_what_changed_travels_and_a_chain_ends_before_it_is_as_long_as_the_whole(tmp_path: Path) -> None:
    found = published(tmp_path, [0, 80, 80, 5000, 80, 80] + [400] * 14)
    whole = found[0][0].bytes
    assert [ref.bytes < whole / 20 for ref, _, _ in found[1:3]] == [True, True]
    begins = [ref.newest == ref.folder for ref, _, _ in found]
    assert begins[:6] == [True, False, False, True, False, False]  # the fourth changed more than half
    assert any(begins[6:])
    chain = 0
    for (ref, _, _), begin in zip(found, begins, strict=True):
        chain = 0 if begin else chain + ref.bytes
        assert chain < whole * 1.02  # what the files have beside the tensors


def test_the_folders_of_the_newest_two_versions_stay_with_all_that_they_are_made_of(tmp_path: Path) -> None:
    names = [stay for _, _, stay in published(tmp_path, [0, 80, 80, 5000, 80, 80])]
    versions = [sorted(int(name.rpartition("_")[2]) for name in stay) for stay in names]
    assert versions == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [3, 4], [3, 4, 5]]


def test_what_is_damaged_on_its_way_is_refused_whole_or_missing(tmp_path: Path) -> None:
    (first, _, _), (second, weights, _) = published(tmp_path, [0, 50])
    folders = [first.folder, second.newest]
    file = second.newest / CHANGES
    good = load_file(file)
    base = changed(folders[:1], 0, None)

    def refused(changes: dict[str, Tensor], said: str) -> None:
        save_file(changes, file)
        with pytest.raises(ValueError, match=said):
            changed(folders, 1, (0, {name: tensor.clone() for name, tensor in base.items()}))
        with pytest.raises(DataError, match="torn"):
            read_weights(second.newest, version=1, held=(0, base))

    values = good["b#values"].clone()
    values[3] ^= 1
    refused(good | {"b#values": values}, "b is")
    refused({name: tensor for name, tensor in good.items() if not name.startswith("c")}, "c is")
    save_file(good, file)
    assert same(changed(folders, 1, None), weights)
    manifest = json.loads((second.newest / MANIFEST).read_text())
    for base_version in (5, 1, -1, "x"):
        (second.newest / MANIFEST).write_text(json.dumps(manifest | {"base": base_version}))
        with pytest.raises(DataError, match="expected one before 1"):
            read_weights(second.newest, version=1)


def test_after_a_version_that_was_not_taken_comes_a_whole_one(tmp_path: Path) -> None:
    weights = Weights()
    way = Delta(cast(Policy, weights), tmp_path, "tensors")

    def prepared(version: int) -> Any:
        weights.change(50, version)
        return asyncio.run(way.prepared(version))

    way.taken(prepared(0))
    assert prepared(1).changes
    again = prepared(2)
    assert again.changes == ()
    way.taken(again)
    assert prepared(3).changes == (tmp_path / "version_000003",)


def test_what_is_held_stays_as_it_was_where_a_server_refuses(tmp_path: Path) -> None:
    (_, old, _), (ref, _, _) = published(tmp_path, [0, 50])
    before = {name: tensor.clone() for name, tensor in old.items()}
    read_weights(ref.newest, version=1, held=(0, old))
    assert same(old, before)
