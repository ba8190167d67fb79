"""Checkpoints: any set of `Stateful` objects, saved atomically, verified on load, never pickled.

A checkpoint is a folder `step_000100/` with a `<part>.json` for each part, a `<part>.safetensors` where the part has
tensors, and a `manifest.json` with the size and BLAKE2b checksum of every file. It is written beside its place and
renamed into it, so a folder of that name is always complete. `latest` is a text file that names the one to resume from.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from groupwise.checkpoint.codec import CodecError, decode_state, encode_state
from groupwise.errors import CheckpointError
from groupwise.files import sync_folder, write_json_atomic, write_text_atomic
from groupwise.types import Stateful

FORMAT = 1
MANIFEST = "manifest.json"
LATEST = "latest"
_ASIDE = ".old-"
_STEP_FOLDER = re.compile(r"(?:\.old-)?step_(\d{6,})")


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file's entry in the manifest: its size in bytes and its BLAKE2b-256 checksum, in hex."""

    bytes: int
    blake2b: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a checkpoint holds; `files` has every file but the manifest itself.

    Example:
        Manifest(step=100, parts=("policy", "sampler"), files={"policy.json": StoredFile(812, "9f…"), …})
    """

    step: int
    parts: tuple[str, ...]
    files: Mapping[str, StoredFile]


def save_checkpoint(root: Path, step: int, parts: Mapping[str, Stateful], *, keep: int) -> Path:
    """Write `root/step_<step>`, point `latest` at it, and remove all but the newest `keep` checkpoints up to this step.

    A process killed at any instant leaves either the old state of `root` or the new one. An existing checkpoint of the
    same step is replaced.

    Args:
        parts: name -> object whose `state_dict()` is saved; see `groupwise.checkpoint.codec` for what a state may hold.
        keep: at least 1.

    Raises:
        CheckpointError: the disk is full or not writable, or a state holds something that cannot be stored; older
            checkpoints are untouched, and nothing of the new one remains.
    """
    assert keep >= 1, f"keep must be at least 1, not {keep}"
    assert step >= 0, f"step must not be negative, not {step}"
    folder = root / f"step_{step:06d}"
    temporary = root / f".tmp-{folder.name}-{os.getpid()}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        _recover(root)
        temporary.mkdir()
        _write_parts(temporary, step, parts)
        _put_in_place(temporary, folder)
        write_text_atomic(root / LATEST, folder.name + "\n")
    except CodecError as error:
        raise CheckpointError(f"{folder}: {error}") from None
    except (OSError, SafetensorError) as error:
        raise CheckpointError(_why_not_written(error, folder)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _prune(root, step=step, keep=keep)
    return folder


def load_checkpoint(path: Path, parts: Mapping[str, Stateful]) -> int:
    """Verify the whole checkpoint, then give each part its state; returns the step. No part changes if any file is bad.

    Parts of the checkpoint that are not asked for are verified and left alone.

    Raises:
        CheckpointError: a file is missing, cut short or altered, or a part is not in the checkpoint; it names the
            file and the older checkpoints that exist.
    """
    manifest = read_manifest(path)
    for name, stored in manifest.files.items():
        _verify(path / name, stored)
    missing = sorted(set(parts) - set(manifest.parts))
    if missing:
        raise CheckpointError(
            f"{path}: got parts {', '.join(manifest.parts)}; expected also {', '.join(missing)}; "
            f"was it saved by another kind of run?{_remedy(path)}"
        )
    states = {name: _read_part(path, name, manifest) for name in parts}
    for name, part in parts.items():
        part.load_state_dict(states[name])
    return manifest.step


def find_latest(root: Path) -> Path | None:
    """The checkpoint that `latest` names, else the newest one; None when there is none. Changes nothing on the disk."""
    complete = list_checkpoints(root)
    with suppress(OSError, UnicodeDecodeError):
        name = (root / LATEST).read_text(encoding="utf-8").strip()
        for path in complete:
            if path.name.removeprefix(_ASIDE) == name:
                return path
    return complete[-1] if complete else None


def list_checkpoints(root: Path) -> list[Path]:
    """All complete checkpoints under `root`, oldest step first.

    One that had stepped aside for its replacement counts while that is not in place: a killed save leaves it so.
    """
    if not root.is_dir():
        return []
    found = [path for path in root.iterdir() if _STEP_FOLDER.fullmatch(path.name) and (path / MANIFEST).is_file()]
    names = {path.name for path in found}
    current = [path for path in found if path.name.removeprefix(_ASIDE) == path.name]
    aside = [path for path in found if path.name.removeprefix(_ASIDE) not in names]
    return sorted(current + aside, key=step_of)


def forget_after(root: Path, step: int) -> None:
    """Make the checkpoint of `step` the newest: `latest` names it, and those of later steps are removed."""
    write_text_atomic(root / LATEST, f"step_{step:06d}\n")
    for path in reversed(list_checkpoints(root)):
        if step_of(path) > step:
            _discard(path)


def step_of(path: Path) -> int:
    """The step that a checkpoint's folder name says."""
    match = _STEP_FOLDER.fullmatch(path.name)
    assert match, f"{path} is not named like a checkpoint"
    return int(match[1])


def read_manifest(path: Path) -> Manifest:
    """What the checkpoint holds.

    Raises:
        CheckpointError: there is no such checkpoint, or its manifest cannot be read.
    """
    if not path.is_dir():
        raise CheckpointError(
            f"{path}: no such checkpoint; expected a folder written by save_checkpoint{_remedy(path)}"
        )
    try:
        content = json.loads((path / MANIFEST).read_bytes())
        if content["format"] != FORMAT:
            raise CheckpointError(
                f"{path}: got checkpoint format {content['format']}; this version of groupwise reads {FORMAT}; "
                "resume with the version that wrote it"
            )
        files = {name: StoredFile(**entry) for name, entry in content["files"].items()}
        return Manifest(int(content["step"]), tuple(content["parts"]), files)
    except FileNotFoundError:
        raise CheckpointError(f"{path / MANIFEST}: the file is missing{_remedy(path)}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path / MANIFEST}: cannot be read ({error}){_remedy(path)}") from error


def _write_parts(folder: Path, step: int, parts: Mapping[str, Stateful]) -> None:
    for name, part in parts.items():
        usable = re.fullmatch(r"[a-z][a-z0-9_]*", name) and f"{name}.json" != MANIFEST
        assert usable, f"a part's name becomes a file name: {name!r}"
        encoded = encode_state(part.state_dict(), name)
        write_json_atomic(folder / f"{name}.json", encoded.structure)
        if encoded.tensors:
            save_file(encoded.tensors, folder / f"{name}.safetensors")
    files = {path.name: asdict(_measure(path)) for path in sorted(folder.iterdir())}
    write_json_atomic(folder / MANIFEST, {"format": FORMAT, "step": step, "parts": list(parts), "files": files})
    sync_folder(folder)


def _measure(path: Path) -> StoredFile:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=32))
    return StoredFile(path.stat().st_size, digest.hexdigest())


def _put_in_place(temporary: Path, folder: Path) -> None:
    """Rename into place. No folder can be renamed over another, so an old one steps aside until the new is there."""
    aside = folder.with_name(f"{_ASIDE}{folder.name}")
    replaced = folder.exists()
    if replaced:
        os.replace(folder, aside)
    try:
        os.replace(temporary, folder)
    except OSError:
        if replaced:
            os.replace(aside, folder)
        raise
    sync_folder(folder.parent)
    if replaced:
        shutil.rmtree(aside, ignore_errors=True)


def _recover(root: Path) -> None:
    """Mend what a killed save left: bring back a checkpoint that had stepped aside, remove half-written folders."""
    for entry in list(root.iterdir()):
        if entry.name.startswith(f"{_ASIDE}step_"):
            original = root / entry.name.removeprefix(_ASIDE)
            if original.exists():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                os.replace(entry, original)
        elif entry.name.startswith(".tmp-step_"):
            shutil.rmtree(entry, ignore_errors=True)


def _prune(root: Path, *, step: int, keep: int) -> None:
    past = [path for path in list_checkpoints(root) if step_of(path) <= step]
    for path in past[:-keep]:
        _discard(path)


def _discard(path: Path) -> None:
    # Renamed first: a folder that is half removed must not look like a checkpoint.
    doomed = path.with_name(f".tmp-{path.name}-old")
    with suppress(OSError):
        os.replace(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _verify(path: Path, stored: StoredFile) -> None:
    if not path.is_file():
        raise CheckpointError(f"{path}: the file is missing{_remedy(path.parent)}")
    size = path.stat().st_size
    if size != stored.bytes:
        raise CheckpointError(f"{path}: got {size} bytes; expected {stored.bytes}{_remedy(path.parent)}")
    if _measure(path) != stored:
        raise CheckpointError(f"{path}: the content has changed since it was saved{_remedy(path.parent)}")


def _read_part(path: Path, name: str, manifest: Manifest) -> dict[str, Any]:
    structure = json.loads((path / f"{name}.json").read_bytes())
    tensors = load_file(path / f"{name}.safetensors") if f"{name}.safetensors" in manifest.files else {}
    return decode_state(structure, tensors)


def _remedy(path: Path) -> str:
    others = [other.name for other in list_checkpoints(path.parent) if other != path]
    if not others:
        return "; there is no other checkpoint to resume from: start again"
    return (
        f"; other checkpoints: {', '.join(others)}: to resume from one, write its name into {path.parent / LATEST}"
        f" and remove {path}"
    )


def _why_not_written(error: OSError | SafetensorError, folder: Path) -> str:
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    full = full or "No space left" in str(error)
    reason = "the disk is full; free some space" if full else f"{error}"
    return f"{folder}: the checkpoint could not be written: {reason}; older checkpoints are untouched"
