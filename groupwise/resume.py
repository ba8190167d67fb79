"""Going on with a run: which checkpoint, whether it is still the same run, and who may write into its directory."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from groupwise.checkpoint import Verified, find_verified
from groupwise.config import Config
from groupwise.config.loading import settings, settings_of_today
from groupwise.config.secrets import without_secrets
from groupwise.errors import ConfigError
from groupwise.fingerprint import value_digest
from groupwise.lock import FolderLock, hold
from groupwise.place import Place
from groupwise.rundir import RunDirectory, check_place, read_run_config, setting_changes

logger = logging.getLogger(__name__)
_EFFECTS = {
    "data column": "rewards would score by other values",
    "data sources": "other rewards would score the rows",
    "data order": "another prompt would come next",
    "data rows": "another row would come next",
    "data": "other tokens would be learned",
    "chat template": "prompts would be rendered in another way",
    "tokenizer": "texts would become other tokens",
    "model": "it would be another base model",
    "base model": "the adapter would have another base",
    "reward": "answers would be scored by other code",
    "threads": "gradients would be added up in another order; set OMP_NUM_THREADS",
    "device": "sums would have another order",
    "dtype": "numbers would be rounded in another way",
    "ledger.jsonl": "what the run learned from would not be known any more",
}
_PACKAGE_EFFECT = "another version may compute other bits"


@dataclass(frozen=True, slots=True)
class Change:
    """One thing that decides the result, and is another than when the checkpoint was saved.

    Example:
        Change("data column answer", was="3f9a…", now="88c1…", effect="rewards would score by other values")
    """

    name: str
    was: str
    now: str
    effect: str = ""

    def __str__(self) -> str:
        return f"{self.name}: was {self.was}, now {self.now}" + (f" ({self.effect})" if self.effect else "")


@dataclass(slots=True)
class Journal:
    """How far a run's growing files are, and what is in them: each is read once, and then what was added.

    Example:
        Journal(run).marks()["ledger.jsonl"]     # {"bytes": 1812, "blake2b": "…"}
    """

    run: RunDirectory
    _seen: dict[str, tuple[int, Any]] = field(default_factory=dict)

    def marks(self) -> dict[str, dict[str, Any]]:
        marks = {file.name: self._mark(file) for file in (self.run.ledger_file, self.run.metrics_file)}
        return marks | {"trajectories": {"files": _num_trajectories(self.run.path)}}

    def _mark(self, file: Path) -> dict[str, Any]:
        size, digest = self._seen.get(file.name, (0, hashlib.blake2b(digest_size=16)))
        if file.is_file():
            with file.open("rb") as stream:
                stream.seek(size)
                while block := stream.read(1 << 20):
                    digest.update(block)
                    size += len(block)
        self._seen[file.name] = (size, digest)
        return {"bytes": size, "blake2b": digest.hexdigest()}


@dataclass(frozen=True, slots=True)
class _RunPart:
    content: dict[str, Any]

    def state_dict(self) -> dict[str, Any]:
        return self.content

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise AssertionError("the part `run` is compared before anything is loaded")


@dataclass(slots=True)
class Identity:
    """What makes a run this run; it is in every checkpoint, as the part `run`.

    Attributes:
        settings: by dotted name. facts: see `groupwise.fingerprint`.
        accepted: what earlier resumes went on with although it had changed: the step, and each change in words.
        remarks: what a comparison found that decides nothing, such as metrics that are gone.
    """

    settings: Mapping[str, Any]
    facts: Mapping[str, str]
    accepted: list[dict[str, Any]] = field(default_factory=list)
    journal: Journal | None = None
    remarks: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, config: Config, facts: Mapping[str, str]) -> Identity:
        return cls(_settings(config), facts)

    def at(self, step: int) -> _RunPart:
        """As it is saved with this step."""
        files = {} if self.journal is None else self.journal.marks()
        content = {"step": step, "settings": dict(self.settings), "facts": dict(self.facts), "files": files}
        return _RunPart({**content, "accepted": list(self.accepted)})

    def changes_since(self, saved: Mapping[str, Any], run: Path) -> list[Change]:
        """Everything that a checkpoint's state of this part says otherwise."""
        changed = setting_changes(self._with_new_ones(settings_of_today(saved["settings"])), self.settings)
        changes = [Change(name, was, now) for name, (was, now) in changed.items()]
        was, now = saved["facts"], self.facts
        for name in sorted({*was, *now}):
            before, after = was.get(name, "absent"), now.get(name, "absent")
            if before != after:
                changes.append(Change(name, before, after, _effect_of(name)))
        return changes + _file_changes(saved["files"], run, self.remarks)

    def _with_new_ones(self, before: Mapping[str, Any]) -> dict[str, Any]:
        """With the settings that an earlier version did not have, and that are at their defaults, which do what it
        did."""
        default = _settings(Config())  # pyright: ignore[reportCallIssue]
        new = (self.settings.keys() & default.keys()) - before.keys()
        return {**before, **{name: default[name] for name in new if default[name] == self.settings[name]}}


@dataclass(frozen=True, slots=True)
class Start:
    """Where a run begins.

    Attributes:
        checkpoint: to go on from; None at the beginning.
        changes: accepted ones.
    """

    checkpoint: Verified | None = None
    changes: tuple[Change, ...] = ()

    @property
    def step(self) -> int | None:
        """Of the checkpoint."""
        return None if self.checkpoint is None else self.checkpoint.step


@contextmanager
def hold_place(path: Path, *, resume: bool, overwrite: bool) -> Iterator[FolderLock]:
    """Refuse what the place refuses, then hold it while the block runs.

    Raises:
        ConfigError: as `RunDirectory.create`, or a live run holds it.
    """
    check_place(path, resume=resume, overwrite=overwrite)
    with hold(path) as lock:
        check_place(path, resume=resume, overwrite=overwrite, mine=True)
        yield lock


def find_start(path: Path, identity: Identity, *, resume: bool, accept: bool) -> Start:
    """The checkpoint to go on from, after a comparison with it; changes nothing on the disk.

    Raises:
        ConfigError: something that decides the result has changed, and `accept` is false; lists everything that has.
        CheckpointError: all checkpoints are damaged.
    """
    if accept and not resume:
        raise ConfigError("--accept-changes says how to go on with a run; give it together with --resume")
    if not resume:
        return Start()
    if Place.of(path).removing:
        return Start()
    found = find_verified(path / "checkpoints")
    if found is None:
        return Start(None, _judge(_config_changes(path, identity), accept=accept))
    saved = found.state("run")
    if saved is None:
        identity.remarks.append(
            f"{found.path} was saved by an earlier version, which kept no fingerprints: only the settings are compared"
        )
        return Start(found, _judge(_config_changes(path, identity), accept=accept))
    if saved["step"] != found.step:
        raise ConfigError(f"{found.path}: its part `run` is of step {saved['step']}; start again with --overwrite")
    identity.accepted = list(saved["accepted"])
    changes = _judge(identity.changes_since(saved, path), accept=accept)
    if changes:
        identity.accepted.append({"step": found.step, "changes": [str(change) for change in changes]})
    return Start(found, changes)


def open_run(config: Config, identity: Identity, place: Path, *, resume: bool, overwrite: bool) -> RunDirectory:
    """Make the run directory, or take the old one, and write down what the run is.

    Raises:
        ConfigError: as `RunDirectory.create`.
    """
    run = RunDirectory.create(place, resume=resume, overwrite=overwrite)
    run.record(config)
    identity.journal = Journal(run)
    return run


def describe_start(run: RunDirectory, start: Start, identity: Identity, *, resume: bool) -> None:
    """Say in the log where the run begins, and what was accepted."""
    if start.checkpoint is not None:
        for problem in start.checkpoint.passed_over:
            logger.warning("a damaged checkpoint is passed over: %s", problem)
        say = logger.warning if start.checkpoint.passed_over else logger.info
        say("resumed from %s", start.checkpoint.path)
    elif resume:
        logger.warning("%s: nothing was saved there yet; the run begins at step 0", run.path)
    for remark in identity.remarks:
        logger.warning("%s", remark)
    for change in start.changes:
        logger.warning("accepted: %s", change)


def _config_changes(path: Path, identity: Identity) -> list[Change]:
    if not (path / "config.json").is_file():
        return []
    changes = setting_changes(_settings(read_run_config(path)), identity.settings)
    return [Change(name, was, now) for name, (was, now) in changes.items() if not name.endswith(".args")]


def _settings(config: Config) -> dict[str, Any]:
    """By dotted name; of a reward's arguments, which may hold a key, a fingerprint."""
    return {
        name: value_digest(value) if name.endswith(".args") and value else value
        for name, value in settings(without_secrets(config)).items()
    }


def _judge(changes: list[Change], *, accept: bool) -> tuple[Change, ...]:
    return tuple(changes) if accept or not changes else _refuse(changes)


def _refuse(changes: list[Change]) -> NoReturn:
    lines = [f"  {change}" for change in changes]
    if any(change.name == "train.steps" for change in changes):
        lines.append("  (train.steps decides the learning rate here: optim.schedule or optim.warmup_ratio is set)")
    raise ConfigError(
        "--resume continues the same run, and this would change it:\n"
        + "\n".join(lines)
        + "\nset it back, go on with it all the same with --accept-changes, or start a new run with another --output"
    )


def _effect_of(name: str) -> str:
    return next((text for start, text in _EFFECTS.items() if name.startswith(start)), _PACKAGE_EFFECT)


def _file_changes(saved: Mapping[str, Mapping[str, Any]], run: Path, remarks: list[str]) -> list[Change]:
    """Only the ledger is a part of the run; that the metrics are gone is said, and nothing else."""
    changes: list[Change] = []
    for name, mark in saved.items():
        if name == "trajectories":
            if (gone := mark["files"] - _num_trajectories(run)) > 0:
                remarks.append(f"{run / name}: {gone} files of steps are gone, of {mark['files']}")
            continue
        now = _prefix(run / name, mark["bytes"])
        if now == mark:
            continue
        change = Change(name, _shown(mark), _shown(now), _effect_of(name))
        if name == "ledger.jsonl":
            changes.append(change)
        else:
            remarks.append(f"{run / name}: was {change.was} when the checkpoint was saved, now {change.now}")
    return changes


def _num_trajectories(run: Path) -> int:
    return sum(1 for _ in (run / "trajectories").glob("step_*"))


def _prefix(file: Path, size: int) -> dict[str, Any]:
    digest, read = hashlib.blake2b(digest_size=16), 0
    if file.is_file():
        with file.open("rb") as stream:
            while block := stream.read(min(1 << 20, size - read)):
                digest.update(block)
                read += len(block)
    return {"bytes": read, "blake2b": digest.hexdigest()}


def _shown(mark: Mapping[str, Any]) -> str:
    return f"{mark['bytes']:,} bytes, {mark['blake2b'][:8]}" if mark["bytes"] else "missing or empty"
