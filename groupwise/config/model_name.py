"""What a name stands for where a model is named: a folder, a Hub name, a run, or a checkpoint of a run.

    models/tiny, Qwen/Qwen3-0.6B             a model folder or an adapter's, or a name on the Hub
    runs/sums                                the run's final/; while there is none, its newest checkpoint
    runs/sums@40, runs/sums@best, @latest    a checkpoint: of a step, of the best evaluation, the newest
    runs/sums/checkpoints/step_000040        a checkpoint by its folder

The one place that knows. It reads names and small JSON files, never weights.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from groupwise.config.lora import ADAPTER_FILE
from groupwise.errors import ConfigError

if TYPE_CHECKING:
    from groupwise.config import Config

MODEL_FILE = "config.json"
FINAL = "final"
BASE = "base"
LATEST = "latest"
BEST = "best"
_STEP_FOLDER = re.compile(r"(?:\.old-)?step_(\d{6,})")
_WHICH = re.compile(r"\d+|best|latest")
_RUN_SECTIONS = frozenset({"model", "data", "rollout", "train"})

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RunCheckpoint:
    """A complete checkpoint of a run.

    Example:
        RunCheckpoint(Path("runs/sums"), step=40, folder=Path("runs/sums/checkpoints/step_000040"))
    """

    run: Path
    step: int
    folder: Path

    @property
    def name(self) -> str:
        return f"{self.run}@{self.step}"

    @property
    def config(self) -> Mapping[str, Any]:
        """The run's config, as its file has it."""
        return read_object(self.run / MODEL_FILE)

    @property
    def has_adapter(self) -> bool:
        """Whether the run trained an adapter, which is all that its checkpoints hold then."""
        lora = self.config.get("lora")
        return isinstance(lora, dict) and bool(lora.get("rank"))


def read_object(file: Path) -> Mapping[str, Any]:
    """The JSON object in a file; an empty one if there is no such file, or something else in it."""
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def is_run(folder: Path) -> bool:
    """Whether it is a run directory: its config.json has our sections, a model's has an architecture."""
    return set(read_object(folder / MODEL_FILE)) >= _RUN_SECTIONS


def is_model(folder: Path) -> bool:
    """Whether it is a folder with a model's or an adapter's config."""
    return (folder / ADAPTER_FILE).is_file() or ((folder / MODEL_FILE).is_file() and not is_run(folder))


def settled_model(name: str) -> str:
    """The same model by a name that means the same tomorrow: `RUN` and `RUN@latest` become `RUN/final` or `RUN@40`.

    Other names stay as they are, also those that lead nowhere. What was taken in place of `final/` is logged.

    Raises:
        ConfigError: a run without a model, or without that checkpoint; it says which there are.
    """
    if checkpoint := named_checkpoint(name):
        return checkpoint.name
    folder = Path(name)
    if not name or is_model(folder):
        return name
    if is_model(folder / FINAL):
        _remark_on_age(folder)
        return str(folder / FINAL)
    if not is_run(folder):
        return name
    if not checkpoints_of(folder):
        raise ConfigError(
            f"model {name!r}: got a run directory without a final model and without a checkpoint; train it first "
            "(--resume or --overwrite), or give a model folder"
        )
    newest = _checkpoint(folder, LATEST)
    logger.warning("%s has no final model; its newest checkpoint is taken: %s", folder, newest.name)
    return newest.name


def settled(config: Config) -> Config:
    """The config with its model by a name that stays (`settled_model`)."""
    path = settled_model(config.model.path)
    if path == config.model.path:
        return config
    return config.model_copy(update={"model": config.model.model_copy(update={"path": path})})


def named_checkpoint(name: str) -> RunCheckpoint | None:
    """The checkpoint that `name` means; None where it means something else.

    Raises:
        ConfigError: it means a checkpoint that is not there.
    """
    folder = Path(name)
    if folder.is_dir():
        return _checkpoint_of_folder(folder)
    head, at, which = name.rpartition("@")
    if not at or not is_run(Path(head)):
        return None
    if not _WHICH.fullmatch(which):
        raise ConfigError(
            f"model {name!r}: got {which!r} after the @; expected a step, best or latest; {_existing(Path(head))}"
        )
    return _checkpoint(Path(head), which)


def run_of(name: str) -> Path | None:
    """The run directory that a name of a model speaks of; None where it is no run's."""
    if checkpoint := named_checkpoint(name):
        return checkpoint.run
    return Path(name) if name and is_run(Path(name)) else None


def kept_base(run: Path) -> Path | None:
    """The model that a run began with, where it keeps a copy: one that began with a checkpoint does."""
    return run / BASE if is_model(run / BASE) else None


def short_name(name: str) -> str:
    """What a model is called in the name of a run directory: one word for all that one run made."""
    folder = Path(name)
    places = (folder, Path(name.rpartition("@")[0]), *([folder.parent] if folder.name == FINAL else []))
    run = next((place for place in places if str(place) != "." and is_run(place)), None)
    return (run.resolve().name if run else folder.name) or "model"


def base_of(checkpoint: RunCheckpoint) -> str:
    """The model that the run began with, as it is named from here; a copy in the run itself, if it has one.

    Raises:
        ConfigError: the run's config names none.
    """
    if kept := kept_base(checkpoint.run):
        return str(kept)
    model = checkpoint.config.get("model")
    name = model.get("path") if isinstance(model, dict) else None
    if not isinstance(name, str) or not name:
        raise ConfigError(
            f"model '{checkpoint.name}': a checkpoint holds what training changed, and the model that this run began "
            f"with was given in memory, so its config.json names none; use the run's {FINAL}/"
        )
    return _seen_from_run(name, checkpoint)


def checkpoints_of(run: Path) -> dict[int, Path]:
    """The complete checkpoints of a run by step, oldest first."""
    root = run / "checkpoints"
    found: dict[int, Path] = {}
    # One that had stepped aside for its replacement sorts first, so the replacement wins where it is in place.
    for folder in sorted(root.iterdir()) if root.is_dir() else ():
        match = _STEP_FOLDER.fullmatch(folder.name)
        if match and (folder / "manifest.json").is_file():
            found[int(match[1])] = folder
    return dict(sorted(found.items()))


def _checkpoint(run: Path, which: str) -> RunCheckpoint:
    there = checkpoints_of(run)
    step = int(which) if which.isdecimal() else _pointed_at(run, which)
    if which == LATEST and step not in there:
        step = max(there, default=None)
    if step is None or step not in there:
        missing = f"no checkpoint of step {which}" if which.isdecimal() else f"no checkpoint named {which}"
        remedy = "; train.keep_best names one" if which == BEST else ""
        raise ConfigError(f"model '{run}@{which}': the run has {missing}; {_existing(run)}{remedy}")
    return RunCheckpoint(run, step, there[step])


def _checkpoint_of_folder(folder: Path) -> RunCheckpoint | None:
    match = _STEP_FOLDER.fullmatch(folder.name)
    if match is None or not (folder / "manifest.json").is_file():
        return None
    run = folder.parent.parent
    if folder.parent.name != "checkpoints" or not is_run(run):
        raise ConfigError(
            f"model {str(folder)!r}: got a checkpoint outside its run; what it holds is read with the run's "
            f"config.json, which is not at {run / MODEL_FILE}; put it back into RUN/checkpoints/"
        )
    return RunCheckpoint(run, int(match[1]), folder)


def _pointed_at(run: Path, pointer: str) -> int | None:
    """The step that `checkpoints/latest` or `checkpoints/best` names."""
    with suppress(OSError, UnicodeDecodeError):
        match = _STEP_FOLDER.fullmatch((run / "checkpoints" / pointer).read_text(encoding="utf-8").strip())
        return int(match[1]) if match else None
    return None


def _existing(run: Path) -> str:
    steps = ", ".join(map(str, checkpoints_of(run)))
    return f"its checkpoints are of the steps {steps}" if steps else "it has no checkpoint"


def _remark_on_age(run: Path) -> None:
    """A run that went on after it had finished, and was interrupted, has newer checkpoints than its final/."""
    finished, newest = read_object(run / "summary.json").get("steps"), max(checkpoints_of(run), default=0)
    if isinstance(finished, int) and newest > finished:
        logger.warning(
            "%s/%s is of step %d, and the run has a newer checkpoint: %s@%d", run, FINAL, finished, run, newest
        )


def _seen_from_run(name: str, checkpoint: RunCheckpoint) -> str:
    """A relative path is looked for where the run was started, as far as its output tells, and then from here."""
    train = checkpoint.config.get("train")
    output = Path(str((train.get("output") if isinstance(train, dict) else "") or f"runs/{checkpoint.run.name}"))
    run = checkpoint.run.resolve()
    if Path(name).is_absolute() or output.is_absolute() or run.parts[-len(output.parts) :] != output.parts:
        return name
    started = Path(*run.parts[: -len(output.parts)])
    there = started / name
    folder = there if there.is_dir() else Path(str(there).rpartition("@")[0])
    return name if started == Path.cwd().resolve() or not folder.is_dir() else str(there)
