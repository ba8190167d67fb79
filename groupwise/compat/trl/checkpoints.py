"""`checkpoint-N` in `output_dir`, where transformers' programs look for it, beside the run directory's own checkpoints.

A folder `checkpoint-N` holds a model as `save_model` writes it, trainer_state.json, training_args.json, and below
`groupwise/` the files of the run's checkpoint, hard-linked, so that they take no room twice. Each of the two is
whole without the other: whichever a kill or a hand removed, the run goes on from the one that is there.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from groupwise.checkpoint import find_latest, list_checkpoints
from groupwise.checkpoint.store import forget_after, step_of
from groupwise.config.lora import own_base
from groupwise.errors import CheckpointError, ConfigError
from groupwise.export.source import name_own_base
from groupwise.files import sync_folder

logger = logging.getLogger(__name__)

STATE_FOLDER = "groupwise"
"""In `checkpoint-N`: the run's own checkpoint."""

_NAME = re.compile(r"checkpoint-(\d+)")
_UNFINISHED = ".saving"


def checkpoints_in(output: Path) -> list[Path]:
    """All folders `checkpoint-N`, whoever wrote them, smallest N first."""
    if not output.is_dir():
        return []
    found = [path for path in output.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=number_of)


def number_of(path: Path) -> int:
    """N of `checkpoint-N`."""
    match = _NAME.fullmatch(path.name)
    assert match, f"{path} is not named like a checkpoint"
    return int(match[1])


def write_checkpoint(
    output: Path, number: int, *, run: Path, step: int, keep: int, fill: Callable[[Path], None]
) -> Path:
    """Make `checkpoint-<number>` of the run's checkpoint of `step`, as one act, and remove all but the newest `keep`.

    Args:
        fill: writes everything else into the folder that it is given, which has the final name already.

    Raises:
        CheckpointError: the disk is full or not writable; the run's own checkpoint is there.
    """
    folder = output / f"checkpoint-{number}"
    place = output / _UNFINISHED
    shutil.rmtree(place, ignore_errors=True)
    new = place / folder.name
    try:
        new.mkdir(parents=True)
        fill(new)
        [source] = [path for path in list_checkpoints(run / "checkpoints") if step_of(path) == step]
        _link(source, new / STATE_FOLDER / f"step_{step:06d}")
        sync_folder(new)
        if folder.exists():  # of this run, which did the step again
            os.replace(folder, place / "before")
        os.replace(new, folder)
        if own_base(folder):  # written under another name
            name_own_base(folder, folder)
        sync_folder(output)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder} cannot be written: {error}; the run can go on from its own checkpoint of step {step} by "
            "resume_from_checkpoint=True, once there is room"
        ) from error
    finally:
        shutil.rmtree(place, ignore_errors=True)
    own = [path for path in checkpoints_in(output) if _state_of(path) is not None and number_of(path) <= number]
    for old in own[:-keep]:
        _discard(old)
    for left in output.glob(".checkpoint-*.old"):  # by a kill in the middle of that
        shutil.rmtree(left, ignore_errors=True)
    return folder


def ready_to_resume(given: Any, *, output: Path, run: Path) -> None:
    """Make the checkpoint that a program names the newest of its run, which then goes on from there.

    Args:
        given: True, or a place: a `checkpoint-N` of `output`, one of the run's own checkpoints, or a folder above.

    Raises:
        ConfigError: there is no checkpoint, or it is not one of this output_dir.
    """
    root = run / "checkpoints"
    chosen = _chosen(given, output=output, root=root)
    step = step_of(chosen)
    later = [path for path in checkpoints_in(output) if (state := _state_of(path)) and step_of(state) > step]
    beyond = [found for found in list_checkpoints(root) if step_of(found) > step]
    if later or beyond:
        last = max(step_of(path) for path in [*beyond, *filter(None, map(_state_of, later))])
        logger.warning(
            "resume_from_checkpoint = %r is asked for, and is not the newest: steps %d to %d are forgotten",
            *(str(given), step + 1, last),
        )
    if chosen.parent != root:
        _bring_back(chosen, root)
    # The newest first: a kill leaves a run that ends at one of its checkpoints.
    for path in reversed(later):
        _discard(path)
    forget_after(root, step)


def _chosen(given: Any, *, output: Path, root: Path) -> Path:
    """The run's checkpoint, in its own folder or in a `checkpoint-N`."""
    newest, own = find_latest(root), [path for path in checkpoints_in(output) if _state_of(path) is not None]
    if newest is None and own:
        newest = _state_of(own[-1])
    if newest is None:
        raise ConfigError(
            f"resume_from_checkpoint = {_shown(given)}: there is no checkpoint in {str(output)!r}; leave it out "
            "to start"
        )
    if given is True:
        return newest
    if isinstance(given, str | Path):
        place = Path(given).resolve()
        if place in {path.resolve() for path in (newest, root, root.parent, output)}:
            return newest
        known = {path.resolve(): path for path in list_checkpoints(root)}
        known |= {path.resolve(): state for path in own if (state := _state_of(path)) is not None}
        if place in known:
            step = step_of(known[place])
            return next((path for path in list_checkpoints(root) if step_of(path) == step), known[place])
        if place.is_dir() and place.parent == output.resolve():
            raise ConfigError(
                f"resume_from_checkpoint = {_shown(given)}: no run of Groupwise wrote it, so its optimiser's state "
                "cannot be read; to begin with its weights, give the folder as model, and another output_dir"
            )
    names = ", ".join(repr(str(path)) for path in own) or repr(str(newest))
    raise ConfigError(
        f"resume_from_checkpoint = {_shown(given)}: expected True or a checkpoint of output_dir = {str(output)!r}, "
        f"where its run is: {names}"
    )


def _state_of(checkpoint: Path) -> Path | None:
    """The run's checkpoint inside a `checkpoint-N`; None where it has none."""
    found = list_checkpoints(checkpoint / STATE_FOLDER)
    return found[-1] if found else None


def _bring_back(state: Path, root: Path) -> None:
    """The run's checkpoint was removed: it comes back from its `checkpoint-N`."""
    root.mkdir(parents=True, exist_ok=True)
    temporary = root / f".tmp-{state.name}-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    _link(state, temporary)
    os.replace(temporary, root / state.name)
    sync_folder(root)


def _link(source: Path, target: Path) -> None:
    """The same files under another name; copies where the disk has no hard links."""
    target.mkdir(parents=True)
    for file in source.iterdir():
        try:
            os.link(file, target / file.name)
        except OSError:
            shutil.copy2(file, target / file.name)
    sync_folder(target)


def _discard(folder: Path) -> None:
    """Renamed first: a folder that is half removed must not look like a checkpoint."""
    doomed = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _shown(given: Any) -> str:
    return repr(str(given)) if isinstance(given, Path) else repr(given)
