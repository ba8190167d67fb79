"""Checkpoints: any set of `Stateful` objects, saved atomically, verified on load, never pickled.

A checkpoint is a folder `step_000100/` with a `<part>.json` for each part, a `<part>.safetensors` where the part has
tensors, and a `manifest.json` with the size and BLAKE2b checksum of every file, and one of its own over the rest of
itself. It is written beside its place and renamed into it, so a folder of that name is always complete. `latest` is a
text file that names the one to resume from, `best` one that names the one of the best evaluation.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from groupwise.checkpoint.codec import CodecError, decode_state, encode_state
from groupwise.checkpoint.folders import (
    ASIDE,
    LATEST,
    MANIFEST,
    STEP_FOLDER,
    list_checkpoints,
    mark_best,
    newest_name,
    step_of,
)
from groupwise.errors import CheckpointError
from groupwise.files import leads_outside, sync_folder, use_umask, write_json_atomic, write_text_atomic
from groupwise.protocols import Stateful

FORMAT = 2
_READABLE = (1, 2)  # a manifest of format 1 has no checksum of its own


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


def save_checkpoint(
    root: Path, step: int, parts: Mapping[str, Stateful], *, keep: int, best: int | None = None
) -> Path:
    """Write `root/step_<step>`, point `latest` at it, and remove all but the newest `keep` checkpoints up to this step.

    A process killed at any instant leaves either the old state of `root` or the new one. An existing checkpoint of the
    same step is replaced.

    Args:
        parts: name -> object whose `state_dict()` is saved; see `groupwise.checkpoint.codec` for what a state may hold.
        keep: at least 1.
        best: the step that `best` shall point at, see `mark_best`; that checkpoint is kept beyond `keep`.

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
        mark_best(root, best)
    except CodecError as error:
        raise CheckpointError(f"{folder}: {error}") from None
    except (OSError, SafetensorError) as error:
        raise CheckpointError(_why_not_written(error, folder)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _prune(root, step=step, keep=keep, spared=best)
    return folder


def load_checkpoint(path: Path, parts: Mapping[str, Stateful], *, optional: Collection[str] = ()) -> int:
    """Verify the whole checkpoint, then give each part its state; returns the step. No part changes if any file is bad.

    Parts of the checkpoint that are not asked for are verified and left alone.

    Args:
        optional: parts that stay as they are where the checkpoint, of an earlier version, has none.

    Raises:
        CheckpointError: a file is missing, cut short or altered, or a part is not in the checkpoint; it names the
            file and the older checkpoints that exist.
    """
    return verify_checkpoint(path).load(parts, optional=optional)


@dataclass(frozen=True, slots=True)
class Verified:
    """A checkpoint whose every file is as it was saved.

    Attributes:
        passed_over: what is wrong with the newer ones.

    Example:
        newest = find_verified(run.checkpoints)
        if newest is not None:
            step = newest.load({"policy": policy})
    """

    path: Path
    manifest: Manifest
    passed_over: tuple[str, ...] = ()

    @property
    def step(self) -> int:
        return self.manifest.step

    def state(self, part: str) -> dict[str, Any] | None:
        """A part's state; None where the checkpoint has no such part."""
        return _read_part(self.path, part, self.manifest) if part in self.manifest.parts else None

    def load(self, parts: Mapping[str, Stateful], *, optional: Collection[str] = ()) -> int:
        """Give each part its state; returns the step.

        Raises:
            CheckpointError: a part is not in the checkpoint, and not `optional`.
        """
        missing = sorted(set(parts) - set(self.manifest.parts) - set(optional))
        if missing:
            raise CheckpointError(
                f"{self.path}: got parts {', '.join(self.manifest.parts)}; expected also {', '.join(missing)}; "
                f"was it saved by another kind of run?{_remedy(self.path)}"
            )
        states = {name: self.state(name) for name in parts}
        for name, part in parts.items():
            if (state := states[name]) is not None:
                part.load_state_dict(state)
        return self.step


def verify_checkpoint(path: Path) -> Verified:
    """Read and check every file of it.

    Raises:
        CheckpointError: a file is missing, cut short or altered; it names the file and the other checkpoints.
    """
    manifest = read_manifest(path)
    for name, stored in manifest.files.items():
        if Path(name).name != name:
            raise CheckpointError(f"{path / MANIFEST}: got {name!r}; expected names of files beside it{_remedy(path)}")
        _verify(path / name, stored)
    return Verified(path, manifest)


def find_verified(root: Path) -> Verified | None:
    """The checkpoint to resume from: the newest one, or where that is damaged the one before it.

    None where there is none at all. Changes nothing on the disk.

    Raises:
        CheckpointError: there are some, and all are damaged.
    """
    problems: list[CheckpointError] = []
    for path in _by_preference(root):
        try:
            found = verify_checkpoint(path)
        except CheckpointError as error:
            problems.append(error)
            continue
        return replace(found, passed_over=tuple(str(problem) for problem in problems))
    if problems:
        raise problems[0]
    return None


def _by_preference(root: Path) -> list[Path]:
    """Every checkpoint, a damaged one without a manifest too: the newest first, those before it, those after it."""
    complete = list_checkpoints(root)
    names = {path.name for path in complete}
    folders = [path for path in root.iterdir() if path.is_dir()] if root.is_dir() else []
    damaged = [path for path in folders if STEP_FOLDER.fullmatch(path.name) and not (path / MANIFEST).is_file()]
    found = [*complete, *(path for path in damaged if path.name.removeprefix(ASIDE) not in names)]
    named = [path for path in found if path.name.removeprefix(ASIDE) == newest_name(root)]
    newest = step_of(named[0]) if named else max(map(step_of, found), default=0)
    return sorted(found, key=lambda path: (step_of(path) <= newest, step_of(path)), reverse=True)


def read_part(path: Path, name: str, *keys: str) -> Any:
    """The state of one part, or what lies under `keys` in it, or None; only what is read is verified.

    Raises:
        CheckpointError: as `load_checkpoint`.

    Example:
        read_part(Path("runs/sums/checkpoints/step_000040"), "policy", "optimizer", "masters")  # {"lm_head.weight": …}
    """
    manifest = read_manifest(path)
    file = f"{name}.json"
    if file not in manifest.files:
        raise CheckpointError(f"{path}: got parts {', '.join(manifest.parts)}; expected also {name}{_remedy(path)}")
    _verify(path / file, manifest.files[file])
    content = json.loads((path / file).read_bytes())
    for key in keys:
        content = content.get(key) if isinstance(content, dict) else None
    return decode_state(content, _OnDemand(path, manifest.files, f"{name}.safetensors"))


class _OnDemand(dict[str, Tensor]):
    """The tensors of a file, which is verified and opened when the first one is asked for."""

    def __init__(self, folder: Path, files: Mapping[str, StoredFile], name: str) -> None:
        super().__init__()
        self._folder, self._files, self._name = folder, files, name
        self._opened: Any = None

    def __missing__(self, tensor: str) -> Tensor:
        if self._opened is None:
            _verify(self._folder / self._name, self._files[self._name])
            self._opened = safe_open(self._folder / self._name, "pt")
        return self._opened.get_tensor(tensor)


def forget_after(root: Path, step: int) -> None:
    """Make the checkpoint of `step` the newest: `latest` names it, and those of later steps are removed."""
    write_text_atomic(root / LATEST, f"step_{step:06d}\n")
    for path in reversed(list_checkpoints(root)):
        if step_of(path) > step:
            _discard(path)


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
        if content["format"] not in _READABLE:
            raise CheckpointError(
                f"{path}: got checkpoint format {content['format']}; this version of groupwise reads up to {FORMAT}; "
                "resume with the version that wrote it"
            )
        checksum = content.pop("blake2b", None)
        if checksum != _checksum(content) and (checksum is not None or content["format"] != 1):
            raise ValueError("its content has changed since it was saved")
        files = {name: StoredFile(**entry) for name, entry in content["files"].items()}
        if content["step"] != step_of(path):
            raise ValueError(f"it is of step {content['step']}, and the folder is named {path.name}")
        if not all(isinstance(name, str) for name in (*content["parts"], *files)):
            raise ValueError("names of parts and files are text")
        _check_parts(content["parts"], files)
        return Manifest(step_of(path), tuple(content["parts"]), files)
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
    use_umask(folder)
    files = {path.name: asdict(_measure(path)) for path in sorted(folder.iterdir())}
    content = {"format": FORMAT, "step": step, "parts": list(parts), "files": files}
    write_json_atomic(folder / MANIFEST, {**content, "blake2b": _checksum(content)})
    sync_folder(folder)


def _checksum(content: Mapping[str, Any]) -> str:
    """Of a manifest's meaning: spaces and the order of keys do not count."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=32).hexdigest()


def _check_parts(parts: list[str], files: Mapping[str, StoredFile]) -> None:
    for name in parts:
        if f"{name}.json" not in files:
            raise ValueError(f"it names the part {name} and not its file")


def _measure(path: Path) -> StoredFile:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=32))
    return StoredFile(path.stat().st_size, digest.hexdigest())


def _put_in_place(temporary: Path, folder: Path) -> None:
    """Rename into place. No folder can be renamed over another, so an old one steps aside until the new is there."""
    aside = folder.with_name(f"{ASIDE}{folder.name}")
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
        if entry.name.startswith(f"{ASIDE}step_"):
            original = root / entry.name.removeprefix(ASIDE)
            if original.exists():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                os.replace(entry, original)
        elif entry.name.startswith(".tmp-step_"):
            shutil.rmtree(entry, ignore_errors=True)


def _prune(root: Path, *, step: int, keep: int, spared: int | None) -> None:
    past = [path for path in list_checkpoints(root) if step_of(path) <= step]
    for path in past[:-keep]:
        if step_of(path) != spared:
            _discard(path)


def _discard(path: Path) -> None:
    # Renamed first: a folder that is half removed must not look like a checkpoint.
    doomed = path.with_name(f".tmp-{path.name}-old")
    with suppress(OSError):
        os.replace(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _verify(path: Path, stored: StoredFile) -> None:
    # A manifest may come from anywhere, and so may what lies beside it.
    if leads_outside(path, path.parent.parent) or path.is_symlink():
        raise CheckpointError(f"{path}: it is a link, or leads out of the run; expected the file that was saved there")
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
