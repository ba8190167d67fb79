"""Trackers by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path

from groupwise.config import TrackingConfig
from groupwise.errors import ConfigError, nearest
from groupwise.texts import one_line
from groupwise.tracking.background import Background
from groupwise.tracking.base import Tracker
from groupwise.tracking.composite import Trackers
from groupwise.tracking.console import ConsoleTracker
from groupwise.tracking.facts import RunFacts
from groupwise.tracking.jsonl import JsonlTracker
from groupwise.tracking.mlflow import MlflowTracker
from groupwise.tracking.swanlab import SwanLabTracker
from groupwise.tracking.tensorboard import TensorBoardTracker
from groupwise.tracking.trackio import TrackioTracker
from groupwise.tracking.wandb import WandbTracker

BUILDERS: Mapping[str, Callable[[RunFacts], Tracker]] = {
    "console": lambda run: ConsoleTracker(
        title=run.title,
        total_steps=run.total_steps,
        resumed_step=run.resumed_step,
        accuracy_of=run.accuracy_of,
        lines_every=run.lines_every,
    ),
    "jsonl": lambda run: JsonlTracker(resumed_step=run.resumed_step),
    "tensorboard": lambda run: TensorBoardTracker(title=run.title, resumed_step=run.resumed_step),
    "wandb": lambda run: Background("wandb", WandbTracker(run)),
    "swanlab": lambda run: Background("swanlab", SwanLabTracker(run)),
    "trackio": lambda run: Background("trackio", TrackioTracker(run)),
    "mlflow": lambda run: Background("mlflow", MlflowTracker(run)),
}


def build_trackers(
    config: TrackingConfig,
    *,
    run_name: str,
    total_steps: int | None = None,
    resumed_step: int | None = None,
    accuracy_of: str = "",
    lines_every: float = 0.0,
) -> Trackers:
    """The trackers that the config names; nothing is opened before `start`.

    Args:
        run_name: used when `config.run_name` is None: the run directory's name.
        total_steps: of the whole run, those before a resume included; None when it is not known.
        resumed_step: last step of the checkpoint that the run continues from; None in a new run.
        accuracy_of: the reward that `eval/accuracy` counts.
        lines_every: seconds between two lines on the terminal; 0 has one for each step.

    Raises:
        ConfigError: a name is unknown, or stands twice.
    """
    check_backends(config)
    facts = RunFacts(
        one_line(config.project),
        one_line(config.run_name or run_name),
        total_steps=total_steps,
        resumed_step=resumed_step,
        mode=config.mode,
        folder=Path(config.folder) if config.folder else None,
        accuracy_of=accuracy_of,
        lines_every=lines_every,
    )
    built = {name: BUILDERS[name](facts) for name in config.backends}
    return Trackers(built, samples_every=config.samples_every, samples=config.samples)


def missing_packages(config: TrackingConfig) -> list[str]:
    """Of the trackers that the config names, those whose package is not installed: they will be off."""
    return [name for name in config.backends if name not in ("console", "jsonl") and find_spec(name) is None]


def check_backends(config: TrackingConfig) -> None:
    """Refuse names that no tracker has; cheap, for checks before a model is loaded.

    Raises:
        ConfigError: names the nearest tracker.
    """
    for index, name in enumerate(config.backends):
        if name in config.backends[:index]:
            raise ConfigError(f"tracking.backends: got {name!r} twice; name each tracker once")
        if name not in BUILDERS:
            hint = nearest(name, BUILDERS, "; did you mean {!r}?")
            raise ConfigError(f"tracking.backends: got {name!r}; expected any of {', '.join(BUILDERS)}{hint}")
