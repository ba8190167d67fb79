"""What is exported: a model folder, a LoRA adapter with its base, or a run directory, which stands for its `final/`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from groupwise.config.lora import OWN_BASE, own_base
from groupwise.errors import ConfigError
from groupwise.files import write_json_atomic

ADAPTER_CONFIG = "adapter_config.json"
MODEL_CONFIG = "config.json"


@dataclass(frozen=True, slots=True)
class Source:
    """A folder that holds a model or an adapter.

    Attributes:
        base: the model that an adapter belongs to, a folder or a Hub name; None for a whole model.
        run: the run directory that the folder came out of, for the model card; None if it is not in one.

    Example:
        find_source("runs/sums") == Source(Path("runs/sums/final"), base=None, run=Path("runs/sums"))
    """

    folder: Path
    base: str | None = None
    run: Path | None = None

    @property
    def is_adapter(self) -> bool:
        return self.base is not None


def find_source(path: str | Path, *, base: str | None = None) -> Source:
    """The model in `path`.

    Args:
        base: of an adapter, instead of the one that its adapter_config.json names.

    Raises:
        ConfigError: there is no model, no adapter, or no base for the adapter.
    """
    given = Path(path)
    if not given.is_dir():
        raise ConfigError(f"{given}: no such folder; expected a run directory, a model folder or an adapter folder")
    folder = given / "final" if is_run(given) else given
    run = next((place for place in (given, given.parent) if is_run(place)), None)
    if (folder / ADAPTER_CONFIG).is_file():
        return Source(folder, _base_of(folder, base), run)
    if base is not None:
        raise ConfigError(f"{folder}: got --base, but this is a whole model, not an adapter; leave --base out")
    if not (folder / MODEL_CONFIG).is_file():
        raise ConfigError(
            f"{folder}: got a folder without {MODEL_CONFIG} and without {ADAPTER_CONFIG}; expected a Hugging Face "
            "model folder, an adapter folder, or a run that has finished"
        )
    return Source(folder, run=run)


def is_run(folder: Path) -> bool:
    """Whether it is a run directory: its config.json has our sections, a model's has an architecture."""
    content = read_object(folder / MODEL_CONFIG)
    return {"model", "data", "train"} <= set(content)


def read_object(file: Path) -> Mapping[str, Any]:
    """The JSON object in a file; an empty one if there is no such file, or something else in it."""
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def name_own_base(folder: Path, home: Path) -> None:
    """Let the adapter in `folder` name the base beside it, for readers that know nothing of that.

    Args:
        home: where the folder is to lie in the end.
    """
    file = folder / ADAPTER_CONFIG
    write_json_atomic(file, {**read_object(file), "base_model_name_or_path": str(home.resolve() / OWN_BASE)})


def _base_of(folder: Path, base: str | None) -> str:
    found = base or own_base(folder) or read_object(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not found:
        raise ConfigError(f"{folder / ADAPTER_CONFIG} names no base model; give it with --base FOLDER")
    if Path(found).is_dir() or (found.count("/") == 1 and not found.startswith((".", "/", "~"))):
        return str(found)
    raise ConfigError(
        f"the adapter's base model {found!r} is no folder here (paths are relative to {str(Path.cwd())!r}), and no "
        "Hub name (`owner/name`) either; give its place with --base FOLDER"
    )
