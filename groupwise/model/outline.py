"""What can be known of a model without its weights: every check of loading that needs its config and files alone."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from groupwise.config import LoraConfig, ModelConfig
from groupwise.config.checks import require_batch_invariance
from groupwise.config.lora import read_adapter_file
from groupwise.config.model_name import named_checkpoint, settled_model
from groupwise.errors import ConfigError
from groupwise.model.adapters import add_adapter
from groupwise.model.checkpoints import base_config
from groupwise.model.invariant.use import require_gpu
from groupwise.model.loading import check_attention, resolve_device

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


def check_model(config: ModelConfig, lora: LoraConfig) -> None:
    """Refuse what `load_model` and `with_adapter` would refuse after minutes of reading: an architecture that cannot
    run packed, files that are missing or cut short, layers of `lora.target_modules` that the model does not have.

    Raises:
        ConfigError: as these two.
    """
    if config.batch_invariant:
        require_batch_invariance(config)
        require_gpu(resolve_device(config.device))
    whole, has_adapter = _whole(config)
    check_files(whole.path)
    model = _without_weights(whole)
    check_attention(model)
    if lora.rank and not has_adapter:
        add_adapter(model, lora)


def model_without_weights(config: ModelConfig, lora: LoraConfig) -> PreTrainedModel:
    """The modules that `load_model` and `with_adapter` would make, their weights on the meta device.

    Raises:
        ConfigError: config.json cannot be read, or the model has no such layers.
    """
    model = _without_weights(whole_model(config))
    if lora.rank:
        add_adapter(model, lora)
    return model


def whole_model(config: ModelConfig) -> ModelConfig:
    """The model that everything else, checkpoints and adapters, is laid over."""
    return _whole(config)[0]


def _whole(config: ModelConfig) -> tuple[ModelConfig, bool]:
    """The model that everything else is laid over, and whether an adapter is among that."""
    config = config.model_copy(update={"path": settled_model(config.path)})
    if checkpoint := named_checkpoint(config.path):
        whole, below = _whole(base_config(config, checkpoint))
        return whole, below or checkpoint.has_adapter
    if adapter := read_adapter_file(Path(config.path)):
        return _whole(config.model_copy(update={"path": adapter.base}))[0], True
    return config, False


def check_files(path: str) -> None:
    """Refuse a folder whose weights are not all there. Of a Hub's model nothing is asked.

    Raises:
        ConfigError: names the file.
    """
    folder = Path(path)
    if not folder.is_dir():
        return
    present = [name for name in _WEIGHTS if (folder / name).is_file() or (folder / f"{name}.index.json").is_file()]
    if not present:
        raise ConfigError(f"model.path = {path!r} could not be loaded: no weights in it: expected {_WEIGHTS[0]}")
    for file in _files(folder, present[0]):
        if not (folder / file).is_file():
            raise ConfigError(f"model.path = {path!r} could not be loaded: {file}, which its index names, is missing")
        if file.endswith(".safetensors"):
            _check_whole(folder / file, path)


def _files(folder: Path, name: str) -> list[str]:
    if (folder / name).is_file():
        return [name]
    with suppress(OSError, ValueError, KeyError, AttributeError):  # a damaged index is for the loader to explain
        index = json.loads((folder / f"{name}.index.json").read_bytes())
        return sorted({str(file) for file in index["weight_map"].values()})
    return []


def _check_whole(file: Path, path: str) -> None:
    """A safetensors file's head says how long it is."""
    try:
        with safe_open(file, "pt"):
            pass
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"model.path = {path!r} could not be loaded: {file.name}: {error}") from error


def _without_weights(config: ModelConfig) -> PreTrainedModel:
    try:
        hf_config = AutoConfig.from_pretrained(config.path, trust_remote_code=config.trust_remote_code)
        with torch.device("meta"):
            made: Any = AutoModelForCausalLM.from_config(hf_config, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ConfigError(f"model.path = {config.path!r} could not be loaded: {first}") from error
    return made
