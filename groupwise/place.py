"""What may be done with the folder that a run is to be in: begun, gone on with, replaced, or left alone."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from groupwise.errors import ConfigError
from groupwise.files import last_step, leads_outside, write_text_atomic
from groupwise.lock import holder, is_lock, refusal
from groupwise.wishes import FILES

KNOWN_NAMES = frozenset(
    {
        "config.json",
        "versions.json",
        "trust.json",
        "log.txt",
        "metrics.jsonl",
        "samples.jsonl",
        "ledger.jsonl",
        "findings.jsonl",
        "summary.json",
        "origins.json",
        "report.html",
        "comparison.html",
        "plot.svg",
        *FILES.values(),
        "trajectories",
        "checkpoints",
        "base",
        "final",
        "bundles",
        "engines",
        "weights",
        "tensorboard",
        "tracking",
    }
)
REMOVING = ".removing"
_TEMPORARY = re.compile(r"\..+\.tmp")
_FIRST_NAMES = frozenset({"versions.json", "trust.json", "base", "log.txt", "checkpoints", "trajectories"})


@dataclass(frozen=True, slots=True)
class Place:
    """A folder, new or of an earlier run.

    Attributes:
        names: what is in it, without empty folders and the lock's files.
        removing: the removal of an earlier run was cut short; what is left of it is worth nothing.

    Example:
        Place(Path("runs/one"), names=("checkpoints", "config.json", "ledger.jsonl"), removing=False)
    """

    folder: Path
    names: tuple[str, ...]
    removing: bool

    @classmethod
    def of(cls, folder: Path) -> Place:
        if not folder.is_dir():
            return cls(folder, (), removing=False)
        entries = [entry for entry in folder.iterdir() if not is_lock(entry.name) and _holds_something(entry)]
        names = sorted(entry.name for entry in entries)
        return cls(folder, tuple(name for name in names if name != REMOVING), REMOVING in names)

    @property
    def foreign(self) -> list[str]:
        return [name for name in self.names if name not in KNOWN_NAMES and not _TEMPORARY.fullmatch(name)]

    @property
    def has_checkpoint(self) -> bool:
        """One that can be resumed from, or is damaged; not what a killed save left half written."""
        found = self.folder.glob("checkpoints/*step_*") if not self.removing else ()
        return any(not entry.name.startswith(".tmp-") for entry in found)

    @property
    def is_begun(self) -> bool:
        """Whether a run was begun here and ended before it had finished anything."""
        if self.foreign or self.has_checkpoint or {"final", "summary.json"} & {*self.names}:
            return False
        lasting = {name for name in self.names if not _TEMPORARY.fullmatch(name)}
        return _is_run_config(self.folder / "config.json") or lasting <= _FIRST_NAMES

    def check_new(self) -> None:
        """Raises ConfigError if a new run would replace something."""
        if not self.names or self.removing:
            return
        if not self.is_begun or last_step(self.folder / "ledger.jsonl") > 1:
            raise ConfigError(
                f"{self.folder}: the run directory is not empty; use --resume to continue from its last checkpoint, "
                "--overwrite to replace it, or another --output"
            )

    def check_resumable(self) -> None:
        """Raises ConfigError if there is nothing to go on with, or to begin again."""
        if self.removing or self.has_checkpoint:
            return
        if not self.names and not (self.folder / "checkpoints").is_dir():
            raise ConfigError(
                f"{self.folder}: got an empty or missing run directory; there is nothing to --resume; leave it out"
            )
        if not self.is_begun:
            raise ConfigError(
                f"{self.folder}: the run has no checkpoint, so there is nothing to --resume; start it again with "
                "--overwrite, or choose another --output"
            )

    def check_links(self) -> None:
        """Raises ConfigError if a link leads out of the run: it would be read or written anywhere."""
        found = [entry for pattern in ("*", "checkpoints/*", "checkpoints/*/*") for entry in self.folder.glob(pattern)]
        for entry in sorted(found):
            if entry.is_symlink() and leads_outside(entry, self.folder):
                raise ConfigError(
                    f"{entry}: it is a link that leads out of the run, to {entry.resolve()}; put what it leads to in "
                    "its place, or use --overwrite, which removes the link alone"
                )

    def check_removable(self) -> None:
        """Raises ConfigError if something is there that no run writes."""
        if self.foreign:
            raise ConfigError(
                f"{self.folder}: --overwrite removes only what a run writes; it also holds "
                f"{', '.join(self.foreign[:8])}: move that away or choose another --output"
            )
        if self.names and not (self.removing or self.is_begun or _is_run_config(self.folder / "config.json")):
            raise ConfigError(
                f"{self.folder}: --overwrite removes only run directories, and there is no config.json of a run in it; "
                "remove the folder yourself or choose another --output"
            )

    def check_free(self) -> None:
        """Raises ConfigError if a live run holds it."""
        if alive := holder(self.folder):
            raise refusal(self.folder, alive)

    def clear(self) -> None:
        """Remove what a run left. Cut short at any moment, it is taken up again by the next start, of whatever kind."""
        if not self.names and not self.removing:
            return
        self.check_removable()
        write_text_atomic(self.folder / REMOVING, "an earlier run is being removed\n")
        for name in self.names:
            entry = self.folder / name
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink(missing_ok=True)
        (self.folder / REMOVING).unlink()


def _holds_something(entry: Path) -> bool:
    """Empty folders do not count: a run that failed before its first write leaves them."""
    return not entry.is_dir() or entry.is_symlink() or any(entry.iterdir())


def _is_run_config(file: Path) -> bool:
    """A model folder has a config.json too; only a run's has these sections."""
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and {"model", "data", "reward", "rollout", "train"} <= set(content)
