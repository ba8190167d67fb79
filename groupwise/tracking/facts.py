"""What trackers are told about the run, and the names by which they know it."""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from groupwise.files import write_json_atomic

FOLDER = "tracking"


@dataclass(frozen=True, slots=True)
class RunFacts:
    """What trackers may need to know when they are built.

    Attributes:
        total_steps: of the whole run, those before a resume included.
        accuracy_of: the reward that `eval/accuracy` counts.
        lines_every: seconds between two lines on the terminal; 0 has one for each step.
        resumed_step: last step of the checkpoint that the run continues from; None in a new run.
        mode: `auto` is online where the user is logged in.
        folder: for trackers' local files; None is a folder of the run directory.
    """

    project: str
    name: str
    total_steps: int | None = None
    resumed_step: int | None = None
    mode: Literal["auto", "online", "local"] = "auto"
    folder: Path | None = None
    accuracy_of: str = ""
    lines_every: float = 0.0

    @property
    def title(self) -> str:
        return f"{self.project}/{self.name}"

    def local_folder(self, run_dir: Path, backend: str) -> Path:
        """Where this tracker keeps files on this machine; made if it is missing."""
        folder = (self.folder or run_dir / FOLDER) / backend
        folder.mkdir(parents=True, exist_ok=True)
        return folder.resolve()

    def earlier_id(self, run_dir: Path, backend: str) -> str | None:
        """The tracker's name for the run that this one continues; None in a new run, or if it never had one."""
        if self.resumed_step is None:
            return None
        try:
            return str(json.loads(_id_file(run_dir, backend).read_bytes())["id"])
        except FileNotFoundError:
            return None


def new_id() -> str:
    return uuid.uuid4().hex[:16]


def keep_id(run_dir: Path, backend: str, run_id: str) -> None:
    """Remember the tracker's name for this run, so that a resumed run goes on in the same place."""
    file = _id_file(run_dir, backend)
    file.parent.mkdir(exist_ok=True)
    write_json_atomic(file, {"id": run_id})


def _id_file(run_dir: Path, backend: str) -> Path:
    return run_dir / FOLDER / f"{backend}_run.json"
