"""What is exported: a model folder, a LoRA adapter with its base, or a run directory, which stands for its `final/`."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from groupwise.config.lora import ADAPTER_FILE as ADAPTER_CONFIG
from groupwise.config.lora import OWN_BASE, own_base
from groupwise.config.model_name import MODEL_FILE as MODEL_CONFIG
from groupwise.config.model_name import is_run, named_checkpoint, read_object, run_of, settled_model
from groupwise.errors import ConfigError
from groupwise.files import write_json_atomic

__all__ = ["ADAPTER_CONFIG", "MODEL_CONFIG", "Source", "find_source", "is_run", "read_object"]


@dataclass(frozen=True, slots=True)
class Source:
    """A folder that holds a model or an adapter.

    Attributes:
        base: the model that an adapter belongs to, a folder or a Hub name; None for a whole model.
        run: the run directory that the folder came out of, for the model card; None if it is not in one.
        step: of the checkpoint that was written into the folder, with its name (`RUN@40`); None for other folders.

    Example:
        find_source("runs/sums") == Source(Path("runs/sums/final"), base=None, run=Path("runs/sums"))
    """

    folder: Path
    base: str | None = None
    run: Path | None = None
    step: int | None = None
    name: str | None = None

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
    settled = settled_model(str(path))
    if named_checkpoint(settled):
        raise ConfigError(
            f"{settled} is a checkpoint, not a model folder; "
            f"`groupwise export hf {shlex.quote(str(settled))} --out DIR` writes one, as does "
            "groupwise.model.checkpoints.write_checkpoint_model"
        )
    folder = Path(settled)
    if not folder.is_dir():
        raise ConfigError(
            f"{folder}: no such folder; expected a run directory, RUN@STEP, a model folder or an adapter folder"
        )
    run = run_of(str(path)) or run_of(str(folder.parent))
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
