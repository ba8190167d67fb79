"""A run's checkpoint as a model: the model that the run began with, and over it what training had made of it.

A checkpoint holds float32 masters of the weights that are trained: all, or an adapter's. Here they are rounded as the
policy rounds them, so the model has the bits that training had at that step, and `final/` would have.
"""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from groupwise.checkpoint import read_part
from groupwise.config import Config, ModelConfig
from groupwise.config.model_name import (
    BASE,
    FINAL,
    MODEL_FILE,
    RunCheckpoint,
    base_of,
    kept_base,
    named_checkpoint,
    read_object,
    settled,
)
from groupwise.errors import ConfigError
from groupwise.model.loading import LoadedModel, load_model, resolve_device, resolve_dtype, with_adapter
from groupwise.protocols import Tokenizer
from groupwise.rundir import read_run_config


@dataclass(frozen=True, slots=True)
class SettledModel:
    """A config whose model has a name that stays, and what to load for it: in a resumed run that keeps a copy of its
    base, that copy."""

    config: Config
    model: ModelConfig

    @property
    def provided(self) -> tuple[str, ...]:
        """The name in the config may lead nowhere by now, where the run has its copy."""
        return () if self.model is self.config.model else ("model.path",)


def settle_model(config: Config, run: Path, *, resume: bool, given: LoadedModel | None) -> SettledModel:
    """What a run in the folder `run` begins with; as the config says, where the model is `given` in memory.

    Raises:
        ConfigError: the config names a run without a model, or a checkpoint that is not there.
    """
    kept = kept_base(run) if resume else None
    if given is not None:
        return SettledModel(config, config.model)
    if kept is not None:
        return SettledModel(config, config.model.model_copy(update={"path": str(kept)}))
    config = settled(config)
    return SettledModel(config, config.model)


def base_config(config: ModelConfig, checkpoint: RunCheckpoint, *, base: str | None = None) -> ModelConfig:
    """`config` for the model that the run began with (now at `base`, if that is given), with the run's chat template
    where `config` has none.

    What it takes from the run is text alone: whether a folder's code may run is for `config` to say.
    """
    template = config.chat_template or read_run_config(checkpoint.run).model.chat_template
    return config.model_copy(update={"path": base or base_of(checkpoint), "chat_template": template})


def load_checkpoint_model(
    config: ModelConfig, checkpoint: RunCheckpoint, *, tokenizer: Tokenizer | None = None, base: str | None = None
) -> LoadedModel:
    """The model of this checkpoint, computing as `config` says; with an adapter, base and adapter.

    Args:
        base: where the model that the run began with is now, if not where the run's config says.

    Raises:
        ConfigError: the base is not there or another one, or the weights cannot be packed to 4 bits.
        CheckpointError: a file is damaged.
    """
    run = read_run_config(checkpoint.run)
    if config.quantization != "none" and not run.lora.rank:
        raise ConfigError(
            f"model.quantization = {config.quantization!r}: {checkpoint.name} holds whole weights, which are packed "
            "when a model folder is read; write one first: "
            f"`groupwise export hf {shlex.quote(checkpoint.name)} --out DIR`"
        )
    began = load_model(base_config(config, checkpoint, base=base), tokenizer=tokenizer)
    loaded = with_adapter(began, run.lora, seed=run.train.seed)
    masters: dict[str, Tensor] = read_part(checkpoint.folder, "policy", "optimizer", "masters")
    _lay_over(loaded, masters, dtype=trained_dtype(checkpoint, run), checkpoint=checkpoint)
    if not run.lora.rank:
        loaded.model.name_or_path = checkpoint.name
    return loaded


def write_checkpoint_model(checkpoint: RunCheckpoint, folder: Path, *, base: str | None = None) -> None:
    """Write what `final/` would have been, had the run ended at this checkpoint: a model folder, or an adapter's.
    `base` is as in `load_checkpoint_model`; code of its folder is not run.

    Raises:
        ConfigError, CheckpointError: as `load_checkpoint_model`.
    """
    dtype = trained_dtype(checkpoint, read_run_config(checkpoint.run))
    settings = {"path": checkpoint.name, "dtype": str(dtype).removeprefix("torch."), "device": "cpu"}
    _save(load_checkpoint_model(ModelConfig.model_validate(settings), checkpoint, base=base), folder)


def keep_base(loaded: LoadedModel, config: ModelConfig, run: Path) -> None:
    """Write the model that a new run begins with into it, if that is a checkpoint: such a folder goes when its own run
    saves newer ones, and an adapter that is trained now needs a base that others can load."""
    place = run / BASE
    if kept_base(run) is None:  # a resumed run has it
        if named_checkpoint(config.path) is None:
            return
        temporary = place.with_name(f".{place.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        _save(loaded, temporary)
        os.replace(temporary, place)
    if loaded.adapter is None:
        loaded.model.name_or_path = str(place)


def _save(loaded: LoadedModel, folder: Path) -> None:
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)


def trained_dtype(checkpoint: RunCheckpoint, run: Config) -> torch.dtype:
    """Of the weights that computed in the run."""
    named = read_part(checkpoint.folder, "policy", "dtype") or run.model.dtype
    if named == "auto":  # a checkpoint of an earlier version: its own final/ knows, or this machine decides as that did
        named = read_object(checkpoint.run / FINAL / MODEL_FILE).get("dtype") or named
    return resolve_dtype(named, resolve_device("auto"))


@torch.no_grad()
def _lay_over(
    loaded: LoadedModel, masters: Mapping[str, Tensor], *, dtype: torch.dtype, checkpoint: RunCheckpoint
) -> None:
    weights = {name: weight for name, weight in loaded.model.named_parameters() if weight.requires_grad}
    wrong = list(weights.keys() ^ masters.keys())
    wrong += [name for name in weights.keys() & masters.keys() if weights[name].shape != masters[name].shape]
    if wrong:
        raise ConfigError(
            f"model '{checkpoint.name}': {len(wrong)} of its weights do not belong to the model that its run began "
            f"with, {min(wrong)} for one; put the model that was trained back to {base_of(checkpoint)!r}"
        )
    for name, weight in weights.items():
        # A weight that computes in another dtype here was rounded to its own in the run.
        weight.copy_(masters[name] if weight.dtype == dtype else masters[name].to(dtype))
