"""Weights in a folder, and changes of them in others: read, laid over each other, compared with their digests."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor

FORMAT = 1
MANIFEST = "manifest.json"
CHANGES = "changes.safetensors"
"""Weights that changed since the version before: NAME whole, or NAME#gaps and NAME#values."""

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_LARGEST_GAP = 1 << 15


def verified(folder: Path, version: int) -> dict[str, Tensor]:
    """Every tensor of the folder.

    Raises:
        ValueError: it is not what the manifest says.
    """
    expected = read_manifest(folder, version)["tensors"]
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found.update(load_file(file))
    check(found, expected, folder)
    return found


def read_manifest(folder: Path, version: int | None = None) -> dict[str, Any]:
    """
    Args:
        version: that it has to have; None: any.

    Raises:
        ValueError: it is of another version or format.
    """
    manifest = json.loads((folder / MANIFEST).read_bytes())
    wanted = manifest["version"] if version is None else version
    if (manifest["format"], manifest["version"]) != (FORMAT, wanted):
        raise ValueError(
            f"{folder} has version {manifest['version']!r} in format {manifest['format']!r}; expected {wanted} in "
            f"{FORMAT}"
        )
    return manifest


def check(found: Mapping[str, Tensor], expected: Mapping[str, Any], folder: Path) -> None:
    """Compare tensors with a manifest's.

    Raises:
        ValueError: one differs.
    """
    if found.keys() != expected.keys():
        raise ValueError(f"{folder} is torn: {sorted(found.keys() ^ expected.keys())[:3]} are missing or too many")
    for name, tensor in found.items():
        if (fact := fact_of(tensor)) != expected[name]:
            raise ValueError(f"{folder} is torn: {name} is {fact}, and its manifest says {expected[name]}")


def fact_of(tensor: Tensor) -> dict[str, Any]:
    """What a manifest says of a tensor in the host's memory."""
    content = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType]
    digest = hashlib.blake2b(content, digest_size=16).hexdigest()
    return {"shape": list(tensor.shape), "dtype": str(tensor.dtype), "digest": digest}


def changes_of(name: str, old: Tensor, new: Tensor) -> dict[str, Tensor]:
    """What makes the new tensor of the old one, bit for bit: places as distances from the one before, and values; the
    whole tensor where that is shorter; nothing where nothing changed."""
    bits = _INTEGERS[new.element_size()]
    mine, before = new.reshape(-1).view(bits), old.reshape(-1).view(bits)
    places = (mine != before).nonzero()[:, 0]
    if not places.numel():
        return {}
    gaps = torch.diff(places, prepend=places.new_full((1,), -1))
    gaps = gaps.to(torch.int16 if int(gaps.max()) < _LARGEST_GAP else torch.int64)
    if gaps.numel() * (gaps.element_size() + new.element_size()) >= new.numel() * new.element_size():
        return {name: new}
    return {f"{name}#gaps": gaps, f"{name}#values": mine[places]}


def apply(folder: Path, held: Mapping[str, Tensor]) -> None:
    """Lay a folder's changes over `held`, in place.

    Raises:
        ValueError, KeyError: they are not changes of these.
    """
    found = load_file(folder / CHANGES)
    for name in sorted({name.partition("#")[0] for name in found}):
        target = held[name]
        if name in found:
            if (found[name].shape, found[name].dtype) != (target.shape, target.dtype):
                raise ValueError(f"{folder}: {name} is no {target.dtype} of {tuple(target.shape)}")
            target.copy_(found[name])
            continue
        places = found[f"{name}#gaps"].to(torch.int64).cumsum(0) - 1
        values, flat = found[f"{name}#values"], target.view(-1).view(_INTEGERS[target.element_size()])
        if places.numel() != values.numel() or not 0 <= int(places.min()) <= int(places.max()) < flat.numel():
            raise ValueError(f"{folder}: changes of {name} are beyond it")
        flat[places] = values
