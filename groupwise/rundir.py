"""The run directory: what is where, who may write into it, and what a resumed run may change.

runs/NAME/
  config.json  versions.json  trust.json  log.txt  metrics.jsonl  ledger.jsonl  findings.jsonl  summary.json
  samples.jsonl  trajectories/  checkpoints/  base/  final/  bundles/  tensorboard/  tracking/
  weights/ engines/  what goes to engines in other processes, and what those that the run started print
  .lock.1  who holds it, or held it
  origins.json  report.html  comparison.html  plot.svg
  wish.save wish.stop  what somebody beside the run asks of it, see `groupwise.wishes`
"""

from __future__ import annotations

import json
import logging
import os
import platform
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from groupwise import __version__, trajectories
from groupwise.config import Config
from groupwise.config.loading import DEFAULT, config_json
from groupwise.config.renamed import of_today
from groupwise.config.values import literal
from groupwise.errors import ConfigError
from groupwise.files import append_rows, truncate_rows, write_json_atomic, write_text_atomic
from groupwise.notices import logged_to
from groupwise.place import Place
from groupwise.runs.reading import json_object

_PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "peft", "bitsandbytes")
FREE_ON_RESUME = (
    *("data.eval", "train.output", "train.trajectories", "train.stop_after_empty_steps"),
    *("train.save_every", "train.save_every_minutes", "train.keep_checkpoints", "train.keep_best", "train.stop_on"),
)
FREE_SECTIONS_ON_RESUME = ("eval.", "tracking.", "train.doctor.")
_STEP_FILE = re.compile(r".*_(\d+)\.jsonl(?:\.gz)?")


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
    def origins_file(self) -> Path:
        return self.path / "origins.json"

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
    def findings_file(self) -> Path:
        return self.path / "findings.jsonl"

    @property
    def summary_file(self) -> Path:
        return self.path / "summary.json"

    @property
    def report_file(self) -> Path:
        return self.path / "report.html"

    @property
    def trajectories(self) -> Path:
        return self.path / trajectories.FOLDER

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
        return self.trajectories / trajectories.STEP_FILE.format(step)

    def eval_file(self, step: int) -> Path:
        return self.trajectories / trajectories.EVAL_FILE.format(step)

    @classmethod
    def create(cls, path: str | Path, *, resume: bool = False, overwrite: bool = False) -> RunDirectory:
        """Make a new run directory, or open an old one. The caller holds the folder, see `groupwise.lock`.

        Args:
            resume: go on from the directory's checkpoint; a run that ended before its first one begins again.
            overwrite: what an earlier run left there is removed first; nothing else ever is.

        Raises:
            ConfigError: the directory holds something and neither flag is given, both are, there is nothing to
                resume, or there is something in it that no run writes.
        """
        place = check_place(path, resume=resume, overwrite=overwrite, mine=True)
        folder, resume = place.folder, resume and place.has_checkpoint
        try:
            if not resume:
                place.clear()
            (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
            (folder / trajectories.FOLDER).mkdir(exist_ok=True)
        except OSError as error:
            raise ConfigError(f"train.output = {str(folder)!r}: cannot be made: {error}") from error
        return cls(folder.absolute(), resumed=resume)  # wherever the working directory goes

    def record(self, config: Config) -> None:
        """Write config.json and versions.json."""
        write_text_atomic(self.config_file, config_json(config))
        write_json_atomic(self.versions_file, versions())

    def record_origins(self, origins: Mapping[str, str]) -> None:
        """Write origins.json: where each setting that is not a default came from. Those that a resumed run takes from
        its own config.json keep the origin that they had."""
        known = json_object(self.origins_file) if self.resumed else {}
        fresh = {
            name: origin
            for name, origin in origins.items()
            if origin != DEFAULT and Path(origin).absolute() != self.config_file
        }
        if known | fresh:
            write_json_atomic(self.origins_file, known | fresh)

    def append_ledger(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rows, each with its `step`, durably."""
        append_rows(self.ledger_file, rows)

    def truncate_after(self, step: int) -> None:
        """Forget what a killed run wrote after the checkpoint of `step`: ledger rows, findings and trajectory files.

        Raises:
            DataError: a row that is not the last is damaged.
        """
        truncate_rows(self.ledger_file, step)
        truncate_rows(self.findings_file, step)
        for file in self.trajectories.iterdir() if self.trajectories.is_dir() else ():
            match = _STEP_FILE.fullmatch(file.name)
            if match and int(match[1]) > step:
                file.unlink()

    @contextmanager
    def logging(self, level: int = logging.INFO) -> Iterator[None]:
        """Within it, the package's log records from `level` up, and Python's warnings, are appended to log.txt."""
        with logged_to(self.log_file, level):
            yield


def check_place(path: str | Path, *, resume: bool, overwrite: bool, mine: bool = False) -> Place:
    """Everything that `RunDirectory.create` refuses, without changing anything.

    Args:
        mine: this process holds the folder; otherwise one that a live process holds is refused.

    Raises:
        ConfigError: as `RunDirectory.create`.
    """
    folder = Path(path)
    if resume and overwrite:
        raise ConfigError("got both --resume and --overwrite; expected one: go on with the old run, or replace it")
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"train.output = {str(folder)!r}: got a file; expected a folder, new or of an earlier run")
    place = Place.of(folder)
    if not mine:
        place.check_free()
    if not overwrite:
        place.check_links()
    if resume:
        place.check_resumable()
        if place.has_checkpoint:
            read_run_config(folder)
    elif overwrite:
        place.check_removable()
    else:
        place.check_new()
    return place


def describe_place(path: Path, *, resume: bool) -> str:
    """What a run that passed `check_place` would find there, in one line."""
    saved = [folder.parent.name for folder in path.glob("checkpoints/step_*/manifest.json")]
    if resume:
        return (
            f"{path}: the run goes on from {max(saved)}" if saved else f"{path}: the run begins again; none was saved"
        )
    return f"{path}: {'a run is replaced' if path.is_dir() and any(path.iterdir()) else 'a new run'}"


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
        values = json.loads(file.read_bytes())
        return Config.model_validate(of_today(values).values if isinstance(values, dict) else values)
    except FileNotFoundError:
        raise ConfigError(f"{path}: got a folder without config.json; expected a run directory") from None
    except ValidationError as error:
        raise ConfigError(
            f"{file}: got settings that this version of groupwise does not know or accept: {error}"
        ) from None
    except ValueError as error:
        raise ConfigError(f"{file}: got text that is not JSON ({error}); expected a run's config") from None


def setting_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """The settings that would make a run another one, with their old and new values as text.

    Evaluation, tracking, saving and the place of the run are free. So is `train.steps` where the learning rate does
    not depend on it.

    Args:
        before, now: all settings, by dotted name.
    """
    names = [name for name in {**before, **now} if before.get(name, "absent") != now.get(name, "absent")]
    return {name: (_shown(before, name), _shown(now, name)) for name in names if not _free(name, before)}


def _free(name: str, before: Mapping[str, Any]) -> bool:
    if name == "train.steps":
        return before.get("optim.schedule") == "constant" and not before.get("optim.warmup_ratio")
    return name in FREE_ON_RESUME or name.startswith(FREE_SECTIONS_ON_RESUME)


def _shown(values: Mapping[str, Any], name: str) -> str:
    return literal(values[name]) if name in values else "absent"
