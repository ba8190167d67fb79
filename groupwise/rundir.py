"""The run directory: what is where, who may write into it, and what a resumed run may change.

runs/NAME/
  config.json  versions.json  log.txt  metrics.jsonl  ledger.jsonl  summary.json
  samples.jsonl  trajectories/  checkpoints/  final/  bundles/  tensorboard/  tracking/
  report.html
"""

from __future__ import annotations

import json
import logging
import os
import platform
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from groupwise import __version__
from groupwise.config import Config
from groupwise.config.loading import config_json, settings
from groupwise.config.values import literal
from groupwise.errors import ConfigError
from groupwise.files import append_rows, truncate_rows, write_json_atomic, write_text_atomic

KNOWN_NAMES = frozenset(
    {
        "config.json",
        "versions.json",
        "log.txt",
        "metrics.jsonl",
        "samples.jsonl",
        "ledger.jsonl",
        "summary.json",
        "report.html",
        "trajectories",
        "checkpoints",
        "final",
        "bundles",
        "tensorboard",
        "tracking",
    }
)
_PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "peft", "bitsandbytes")
FREE_ON_RESUME = ("data.eval", "train.output", "train.save_every", "train.keep_checkpoints", "train.trajectories")
FREE_SECTIONS_ON_RESUME = ("eval.", "tracking.")
_STEP_FILE = re.compile(r".*_(\d+)\.jsonl(?:\.gz)?")
_TEMPORARY = re.compile(r"\..+\.tmp")


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """Where one run's files are. `create` makes or opens it; the properties only name files.

    Example:
        run = RunDirectory.create("runs/one", resume=False, overwrite=False)
        run.record(config)
        with run.logging():
            run.append_ledger([{"step": 1, "uid": "000017-3fa9", "samples": 8}])
    """

    path: Path
    resumed: bool = False

    @property
    def config_file(self) -> Path:
        return self.path / "config.json"

    @property
    def versions_file(self) -> Path:
        return self.path / "versions.json"

    @property
    def log_file(self) -> Path:
        return self.path / "log.txt"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def ledger_file(self) -> Path:
        return self.path / "ledger.jsonl"

    @property
    def summary_file(self) -> Path:
        return self.path / "summary.json"

    @property
    def report_file(self) -> Path:
        return self.path / "report.html"

    @property
    def trajectories(self) -> Path:
        return self.path / "trajectories"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def final(self) -> Path:
        return self.path / "final"

    @property
    def bundles(self) -> Path:
        return self.path / "bundles"

    def trajectory_file(self, step: int) -> Path:
        return self.trajectories / f"step_{step:06d}.jsonl"

    @classmethod
    def create(cls, path: str | Path, *, resume: bool = False, overwrite: bool = False) -> RunDirectory:
        """Make a new run directory, or open an old one.

        Args:
            resume: the directory must hold a checkpoint to go on from.
            overwrite: what an earlier run left there is removed first; nothing else ever is.

        Raises:
            ConfigError: the directory holds something and neither flag is given, both are, there is nothing to
                resume, or there is something in it that no run writes.
        """
        entries = check_place(path, resume=resume, overwrite=overwrite)
        folder = Path(path)
        if entries and not resume:
            _remove_run(folder, entries)
        try:
            (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
            (folder / "trajectories").mkdir(exist_ok=True)
        except OSError as error:
            raise ConfigError(f"train.output = {str(folder)!r}: cannot be made: {error}") from error
        return cls(folder.absolute(), resumed=resume)  # wherever the working directory goes

    def record(self, config: Config) -> None:
        """Write config.json and versions.json; in a resumed run, first refuse a config that would change its maths.

        Raises:
            ConfigError: lists every setting that differs and must not.
        """
        if self.resumed:
            check_resume(read_run_config(self.path), config)
        write_text_atomic(self.config_file, config_json(config))
        write_json_atomic(self.versions_file, versions())

    def append_ledger(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rows, each with its `step`, durably."""
        append_rows(self.ledger_file, rows)

    def truncate_after(self, step: int) -> None:
        """Forget what a killed run wrote after the checkpoint of `step`: ledger rows and trajectory files.

        Raises:
            DataError: a ledger row that is not the last is damaged.
        """
        truncate_rows(self.ledger_file, step)
        for file in self.trajectories.iterdir() if self.trajectories.is_dir() else ():
            match = _STEP_FILE.fullmatch(file.name)
            if match and int(match[1]) > step:
                file.unlink()

    @contextmanager
    def logging(self, level: int = logging.INFO) -> Iterator[None]:
        """Within it, records of the `groupwise` loggers from `level` up are appended to log.txt."""
        logger = logging.getLogger("groupwise")
        handler = logging.FileHandler(self.log_file, encoding="utf-8", errors="backslashreplace", delay=True)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        handler.setLevel(level)
        before = logger.level
        logger.addHandler(handler)
        if logger.getEffectiveLevel() > level:
            logger.setLevel(level)
        try:
            yield
        finally:
            logger.setLevel(before)
            logger.removeHandler(handler)
            handler.close()


def check_place(path: str | Path, *, resume: bool, overwrite: bool) -> list[str]:
    """Everything that `RunDirectory.create` refuses, without changing anything; returns the names that are there.

    Raises:
        ConfigError: as `RunDirectory.create`.
    """
    folder = Path(path)
    if resume and overwrite:
        raise ConfigError("got both --resume and --overwrite; expected one: go on with the old run, or replace it")
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"train.output = {str(folder)!r}: got a file; expected a folder, new or of an earlier run")
    entries = sorted(entry.name for entry in folder.iterdir() if _holds_something(entry)) if folder.is_dir() else []
    if resume:
        _check_resumable(folder, entries)
    elif entries and not overwrite:
        raise ConfigError(
            f"{folder}: the run directory is not empty; use --resume to continue from its last checkpoint, "
            "--overwrite to replace it, or another --output"
        )
    elif entries:
        _check_removable(folder, entries)
    return entries


def versions() -> dict[str, Any]:
    """What a result may depend on: versions, platform and thread counts. Never the environment, which holds secrets."""
    import torch  # the thread count that computes; loaded by then in every run

    return {
        "python": platform.python_version(),
        "groupwise": __version__,
        **{name: _version(name) for name in _PACKAGES},
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def read_run_config(path: Path) -> Config:
    """The config that a run directory was written with.

    Raises:
        ConfigError: config.json is missing or is not a run's.
    """
    file = path / "config.json"
    try:
        return Config.model_validate(json.loads(file.read_bytes()))
    except FileNotFoundError:
        raise ConfigError(f"{path}: got a folder without config.json; expected a run directory") from None
    except ValidationError as error:
        raise ConfigError(
            f"{file}: got settings that this version of groupwise does not know or accept: {error}"
        ) from None
    except ValueError as error:
        raise ConfigError(f"{file}: got text that is not JSON ({error}); expected a run's config") from None


def check_resume(before: Config, now: Config) -> None:
    """Refuse to go on with a run under settings that would have made it another run.

    Evaluation, tracking, saving and the place of the run are free. So is `train.steps` where the learning rate does
    not depend on it.

    Raises:
        ConfigError: lists each setting with its old and new value.
    """
    old, new = settings(before), settings(now)
    names = [name for name in {**old, **new} if old.get(name, "absent") != new.get(name, "absent")]
    fixed = [name for name in names if not _free(name, before)]
    if not fixed:
        return
    lines = [f"  {name}: was {_shown(old, name)}, now {_shown(new, name)}" for name in fixed]
    if "train.steps" in fixed:
        lines.append("  (train.steps decides the learning rate here: optim.schedule or optim.warmup_ratio is set)")
    raise ConfigError(
        "--resume continues the same run, and these settings would change it:\n"
        + "\n".join(lines)
        + "\nset them back, or start a new run with another --output"
    )


def _free(name: str, before: Config) -> bool:
    if name == "train.steps":
        return before.optim.schedule == "constant" and before.optim.warmup_ratio == 0
    return name in FREE_ON_RESUME or name.startswith(FREE_SECTIONS_ON_RESUME)


def _shown(values: Mapping[str, Any], name: str) -> str:
    return literal(values[name]) if name in values else "absent"


def _holds_something(entry: Path) -> bool:
    """Empty folders do not count: a run that failed before its first write leaves them."""
    return not entry.is_dir() or entry.is_symlink() or any(entry.iterdir())


def _check_resumable(folder: Path, entries: list[str]) -> None:
    if not entries:
        raise ConfigError(
            f"{folder}: got an empty or missing run directory; there is nothing to --resume; leave it out"
        )
    read_run_config(folder)
    if not any(folder.glob("checkpoints/*step_*/manifest.json")):
        raise ConfigError(
            f"{folder}: the run saved no checkpoint, so there is nothing to --resume; start it again with --overwrite "
            "(train.save_every sets how often it saves)"
        )


def _check_removable(folder: Path, entries: list[str]) -> None:
    foreign = [name for name in entries if name not in KNOWN_NAMES and not _TEMPORARY.fullmatch(name)]
    if foreign:
        raise ConfigError(
            f"{folder}: --overwrite removes only what a run writes; it also holds {', '.join(foreign[:8])}: "
            "move that away or choose another --output"
        )
    if not _is_ours(folder / "config.json"):
        raise ConfigError(
            f"{folder}: --overwrite removes only run directories, and there is no config.json of a run in it; "
            "remove the folder yourself or choose another --output"
        )


def _remove_run(folder: Path, entries: list[str]) -> None:
    # config.json goes last: a removal that is cut short can be repeated.
    for name in sorted(entries, key=lambda name: name == "config.json"):
        entry = folder / name
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _is_ours(config_file: Path) -> bool:
    """A model folder has a config.json too; only a run's has these sections."""
    try:
        content = json.loads(config_file.read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and {"model", "data", "reward", "rollout", "train"} <= set(content)
