"""A folder with one version of the weights: written beside, synced, renamed; read back only if every byte is there."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from groupwise.engines.vllm_worker.groupwise_vllm_worker.folder import FORMAT, MANIFEST, apply, fact_of
from groupwise.errors import DataError
from groupwise.files import make_anew, write_json_atomic, writing

WEIGHTS = "weights.safetensors"


def write_weights(folder: Path, tensors: Iterable[tuple[str, Tensor]], *, version: int) -> Path:
    """Write `folder`, whole or not at all; what was there before goes.

    Raises:
        FileError: the disk is full, or the place cannot be written.
    """
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors}
    facts = {name: fact_of(tensor) for name, tensor in held.items()}
    return write_whole(folder, WEIGHTS, held, {"format": FORMAT, "version": version, "tensors": facts})


def write_whole(folder: Path, file: str, tensors: dict[str, Tensor], manifest: Mapping[str, Any]) -> Path:
    """A folder with one file of tensors and its manifest, as `write_weights`.

    Raises:
        FileError: the disk is full, or the place cannot be written.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        make_anew(temporary)
        save_file(tensors, temporary / file)
        (temporary / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
        for written in (temporary / file, temporary / MANIFEST, temporary):
            _sync(written)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
        _sync(folder.parent)
    return folder


def add_manifest(folder: Path, *, version: int) -> None:
    """Name every tensor of a Hugging Face folder's files in a manifest beside them.

    Raises:
        FileError: it cannot be written.
    """
    facts: dict[str, Any] = {}
    for file in sorted(folder.glob("*.safetensors")):
        facts |= {name: fact_of(tensor) for name, tensor in load_file(file).items()}
    write_json_atomic(folder / MANIFEST, {"format": FORMAT, "version": version, "tensors": facts})


def weights_bytes(folder: Path) -> int:
    """What the folder's weights take."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def read_weights(
    folder: Path, *, version: int, held: tuple[int, Mapping[str, Tensor]] | None = None
) -> dict[str, Tensor]:
    """Every tensor, compared with the manifest to the last bit.

    Args:
        held: another version and its tensors, which are left as they are. A folder that has changes alone is laid over
            them, or over the folders beside it that it is made of.

    Raises:
        DataError: the folder is not there, is torn, or holds another version.
    """
    try:
        manifest: Any = json.loads((folder / MANIFEST).read_bytes())
        expected, found_format, found_version = manifest["tensors"], manifest["format"], manifest["version"]
        base = manifest.get("base")
        found = load_file(folder / WEIGHTS) if base is None else {}
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise DataError(f"{folder} holds no whole weights: {type(error).__name__}: {error}") from error
    if found_format != FORMAT:
        raise DataError(f"{folder} has weights in format {found_format!r}; expected {FORMAT}")
    if found_version != version:
        raise DataError(f"{folder} holds version {found_version!r} of the weights; expected {version}")
    if base is not None:
        if not isinstance(base, int) or not 0 <= base < version:
            raise DataError(f"{folder} has changes of version {base!r}; expected one before {version}")
        found = _changed(folder, base, held)
    if found.keys() != expected.keys():
        raise DataError(f"{folder} is torn: {_difference(found.keys(), expected.keys())}")
    for name, tensor in found.items():
        if (fact := fact_of(tensor)) != expected[name]:
            raise DataError(f"{folder} is torn: {name} is {fact}, and its manifest says {expected[name]}")
    return found


def _changed(folder: Path, base: int, held: tuple[int, Mapping[str, Tensor]] | None) -> dict[str, Tensor]:
    """What a folder of changes makes of the version before."""
    if held is not None and held[0] == base:
        found = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in held[1].items()}
    else:
        found = read_weights(folder.with_name(f"version_{base:06d}"), version=base, held=held)
    try:
        apply(folder, found)
    except (OSError, ValueError, KeyError, IndexError, RuntimeError, SafetensorError) as error:
        raise DataError(f"{folder} is torn: {type(error).__name__}: {error}") from error
    return found


def check_fits(found: dict[str, Tensor], wanted: dict[str, Tensor], *, folder: Path) -> None:
    """Refuse weights that are not those of a module, before one of them is touched.

    Raises:
        DataError: names, shapes or types differ.
    """
    if found.keys() != wanted.keys():
        raise DataError(f"{folder} has weights of another model: {_difference(found.keys(), wanted.keys())}")
    for name, tensor in found.items():
        got, expected = (tuple(tensor.shape), tensor.dtype), (tuple(wanted[name].shape), wanted[name].dtype)
        if got != expected:
            raise DataError(f"{folder} has weights of another model: {name} is {got}; expected {expected}")


def _difference(found: Iterable[str], wanted: Iterable[str]) -> str:
    missing, more = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
    parts = [
        f"{len(names)} {what}, {names[0]} for one"
        for names, what in ((missing, "missing"), (more, "too many"))
        if names
    ]
    return "; ".join(parts)


def _sync(place: Path) -> None:
    descriptor = os.open(place, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
