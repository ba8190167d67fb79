"""Reproduction bundles: everything that led to a gradient that is not finite, in a folder of the run directory.

bundles/step_000012/
  bundle.json          the micro-batches with their denominators and losses, and every parameter's gradient norm
  weights.safetensors  the trained weights (float32 masters) that the gradient was taken at
  sides.safetensors    what the engine told beside tokens, where it told anything (`groupwise.sides`)
  config.json  versions.json
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor

from groupwise.batches import NO_KNOBS, Denominators, Knobs, TrainingRow
from groupwise.checkpoint import find_latest
from groupwise.checkpoint.codec import decode_state, encode_state
from groupwise.config import Config
from groupwise.config.loading import config_json
from groupwise.errors import DataError
from groupwise.files import make_anew, use_umask, write_json_atomic, write_text_atomic, writing
from groupwise.inputs import ModelInput, as_json, from_json
from groupwise.policy.microbatches import MicroBatch
from groupwise.policy.optimizer import Gradient
from groupwise.rundir import RunDirectory, versions
from groupwise.sides import Kept, Routes, Sides

KEPT = 3
MOST_WEIGHT_BYTES = 2**30


@dataclass(frozen=True, slots=True)
class LearnedBatch:
    """One micro-batch as the policy met it; `loss` is its part of the update's loss."""

    batch: MicroBatch
    denominators: Denominators
    loss: float
    knobs: Knobs = NO_KNOBS


@dataclass(frozen=True, slots=True)
class Bundle:
    """A gradient that was not finite.

    Attributes:
        update: how many updates came before it; with the run's seed it also decides dropout.
        gradients: by parameter name.
        weights: trained weights by parameter name; None when they were too large to be written.
        supervised: made by `groupwise sft`.
    """

    update: int
    batches: tuple[LearnedBatch, ...]
    gradients: Mapping[str, Gradient]
    weights: Mapping[str, Tensor] | None
    supervised: bool = False


@dataclass(frozen=True, slots=True)
class BundleWriter:
    """Writes the bundles of one run. The newest three are kept: so many in a row stop the run."""

    run: RunDirectory
    config: Config
    supervised: bool = False

    def write(
        self,
        update: int,
        batches: Sequence[LearnedBatch],
        *,
        gradients: Mapping[str, Gradient],
        weights: Mapping[str, Tensor],
    ) -> Path:
        """Write a bundle, whole or not at all; returns its folder."""
        step, place = divmod(update, 1 if self.supervised else self.config.optim.updates_per_batch)
        folder = self.run.bundles / (f"step_{step + 1:06d}" + (f"_update_{place + 1}" if place else ""))
        with writing(folder):
            return self._write(folder, update, batches, gradients=gradients, weights=weights)

    def _write(
        self,
        folder: Path,
        update: int,
        batches: Sequence[LearnedBatch],
        *,
        gradients: Mapping[str, Gradient],
        weights: Mapping[str, Tensor],
    ) -> Path:
        temporary = folder.with_name(f".{folder.name}.tmp")
        folder.parent.mkdir(parents=True, exist_ok=True)
        make_anew(temporary)
        small = sum(weight.nbytes for weight in weights.values()) <= MOST_WEIGHT_BYTES
        if small:
            save_file({name: weight.cpu().contiguous() for name, weight in weights.items()}, temporary / _WEIGHTS)
        latest = find_latest(self.run.checkpoints)
        sides = _sides_of(batches)
        if sides:
            save_file(sides, temporary / _SIDES)
        content = {
            "update": update,
            "supervised": self.supervised,
            "seed": self.config.train.seed,
            "weights": _WEIGHTS if small else None,
            "last_checkpoint": None if latest is None else str(latest),
            "bad_parameters": [name for name, gradient in gradients.items() if gradient.num_bad],
            "gradients": {name: asdict(gradient) for name, gradient in gradients.items()},
            "batches": [_as_json(learned) for learned in batches],
        }
        write_json_atomic(temporary / _CONTENT, encode_state(content, "bundle").structure)
        write_text_atomic(temporary / "config.json", config_json(self.config))
        write_json_atomic(temporary / "versions.json", versions())
        use_umask(temporary)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
        for old in sorted(self.run.bundles.glob("step_*"))[:-KEPT]:
            shutil.rmtree(old)
        return folder


def load_bundle(folder: Path) -> Bundle:
    """Read a bundle back.

    Raises:
        DataError: the folder holds none, or a damaged one.
    """
    try:
        content: Any = decode_state(json.loads((folder / _CONTENT).read_bytes()), {})
        weights = load_file(folder / _WEIGHTS) if content["weights"] else None
        sides = load_file(folder / _SIDES) if (folder / _SIDES).exists() else {}
        batches = tuple(_from_json(learned, number, sides) for number, learned in enumerate(content["batches"]))
        gradients = {name: Gradient(**gradient) for name, gradient in content["gradients"].items()}
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise DataError(f"{folder} is not a whole reproduction bundle: {type(error).__name__}: {error}") from error
    return Bundle(int(content["update"]), batches, gradients, weights, bool(content["supervised"]))


_CONTENT = "bundle.json"
_WEIGHTS = "weights.safetensors"
_SIDES = "sides.safetensors"
_ROUTES = "routes"


def _as_json(learned: LearnedBatch) -> dict[str, Any]:
    rows = [_row_as_json(row) for row in learned.batch.rows]
    return {
        "backward": learned.batch.backward,
        "denominators": asdict(learned.denominators),
        "loss": learned.loss,
        "knobs": asdict(learned.knobs),
        "rows": rows,
    }


def _row_as_json(row: TrainingRow) -> dict[str, Any]:
    values = {field.name: getattr(row, field.name) for field in fields(row) if field.name != "sides"}
    if (routes := row.sides.routes) is not None:
        values[_ROUTES] = {"dtype": routes.dtype, "layers": routes.layers, "k": routes.k, "first": routes.first}
    return {name: as_json(value) if isinstance(value, ModelInput) else _plain(value) for name, value in values.items()}


def _plain(value: Any) -> Any:
    return list(cast("tuple[Any, ...]", value)) if isinstance(value, tuple) else value


def _sides_of(batches: Sequence[LearnedBatch]) -> dict[str, Tensor]:
    """Bytes by `BATCH.ROW.NAME`."""
    found: dict[str, Tensor] = {}
    for batch, learned in enumerate(batches):
        for place, row in enumerate(learned.batch.rows):
            if row.sides.routes is not None:
                found[f"{batch}.{place}.{_ROUTES}"] = _tensor(row.sides.routes.data)
            if row.sides.kept is not None:
                found[f"{batch}.{place}.lengths"] = _tensor(row.sides.kept.lengths)
                found[f"{batch}.{place}.ids"] = _tensor(row.sides.kept.ids)
    return found


def _tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def _sides(content: Mapping[str, Any], name: str, tensors: Mapping[str, Tensor]) -> Sides:
    """What `_sides_of` wrote of a row."""
    routes = kept = None
    if _ROUTES in content:
        routes = Routes(tensors[f"{name}.{_ROUTES}"].numpy().tobytes(), **content[_ROUTES])
    if f"{name}.lengths" in tensors:
        kept = Kept(*(tensors[f"{name}.{part}"].numpy().tobytes() for part in ("lengths", "ids")))
    return Sides(routes, kept)


def _from_json(content: Any, number: int, tensors: Mapping[str, Tensor]) -> LearnedBatch:
    rows = tuple(
        replace(_row(row), sides=_sides(row, f"{number}.{place}", tensors)) for place, row in enumerate(content["rows"])
    )
    denominators = Denominators(**content["denominators"])
    if denominators.expert_counts is not None:
        denominators = replace(denominators, expert_counts=tuple(map(tuple, denominators.expert_counts)))
    knobs = Knobs(**content.get("knobs", {}))
    return LearnedBatch(MicroBatch(rows, content["backward"]), denominators, float(content["loss"]), knobs)


def _row(content: Any) -> TrainingRow:
    values: dict[str, Any] = {name: value for name, value in content.items() if name != _ROUTES}
    if "prompt_ids" in values:  # as bundles were written before inputs had pieces
        values |= {"prompt": [values.pop("prompt_ids")], "follows": [values.pop("token_ids")]}
    made: dict[str, Any] = {
        name: tuple(cast("list[Any]", x)) if isinstance(x, list) else x for name, x in values.items()
    }
    made |= {name: from_json(values[name]) for name in ("prompt", "follows")}
    return TrainingRow(**made)
