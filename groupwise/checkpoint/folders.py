"""Which checkpoints lie under a folder, and which of them the text files beside them name."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

from groupwise.files import write_text_atomic

MANIFEST = "manifest.json"
LATEST = "latest"
BEST = "best"
ASIDE = ".old-"
"""Before the name of a checkpoint that stepped aside for its replacement."""
STEP_FOLDER = re.compile(r"(?:\.old-)?step_(\d{6,})")


def find_latest(root: Path) -> Path | None:
    """The checkpoint that `latest` names, else the newest one; None when there is none. Changes nothing on the disk."""
    complete = list_checkpoints(root)
    name = newest_name(root)
    for path in complete:
        if path.name.removeprefix(ASIDE) == name:
            return path
    return complete[-1] if complete else None


def list_checkpoints(root: Path) -> list[Path]:
    """All complete checkpoints under `root`, oldest step first.

    One that had stepped aside for its replacement counts while that is not in place: a killed save leaves it so.
    """
    if not root.is_dir():
        return []
    found = [path for path in root.iterdir() if STEP_FOLDER.fullmatch(path.name) and (path / MANIFEST).is_file()]
    names = {path.name for path in found}
    current = [path for path in found if path.name.removeprefix(ASIDE) == path.name]
    aside = [path for path in found if path.name.removeprefix(ASIDE) not in names]
    return sorted(current + aside, key=step_of)


def step_of(path: Path) -> int:
    """The step that a checkpoint's folder name says."""
    match = STEP_FOLDER.fullmatch(path.name)
    assert match, f"{path} is not named like a checkpoint"
    return int(match[1])


def newest_name(root: Path) -> str | None:
    with suppress(OSError, UnicodeDecodeError):
        return (root / LATEST).read_text(encoding="utf-8").strip()
    return None


def mark_best(root: Path, step: int | None) -> None:
    """Point `best` at the checkpoint of this step, if there is one; also after a kill between its save and its mark."""
    folder = None if step is None else root / f"step_{step:06d}"
    if folder is not None and (folder / MANIFEST).is_file():
        write_text_atomic(root / BEST, folder.name + "\n")
