"""Weights on disk, read one at a time: a folder's safetensors, or those of a Hub name that is in the local cache."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel

_ONE, _INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class StoredWeights:
    """Where each weight of a model lies.

    Attributes:
        files: weight's name to file.

    Example:
        StoredWeights.find("Qwen/Qwen3-0.6B").read("model.norm.weight")
    """

    files: Mapping[str, Path]

    @staticmethod
    def find(place: str) -> StoredWeights | None:
        """Of a folder or a Hub name; None where no safetensors of it are on this machine."""
        try:
            one = _file(place, _ONE)
            if one is not None:
                with safe_open(one, framework="pt") as opened:
                    return StoredWeights(dict.fromkeys(opened.keys(), one))
            index = _file(place, _INDEX)
            if index is None:
                return None
            named = json.loads(index.read_bytes())["weight_map"]
            places = {file: _file(place, file) for file in set(named.values())}
        except (OSError, ValueError, KeyError, AttributeError, SafetensorError):
            return None
        found = {name: there for name, file in named.items() if (there := places[file]) is not None}
        return StoredWeights(found) if len(found) == len(named) else None

    def name_of(self, name: str, module: PreTrainedModel) -> str | None:
        """The stored name of a module's weight: files may leave out the prefix of the decoder, or have it."""
        prefix = f"{module.base_model_prefix}."
        for candidate in (name, name.removeprefix(prefix), prefix + name):
            if candidate in self.files:
                return candidate
        return None

    def read(self, name: str) -> Tensor:
        with safe_open(self.files[name], framework="pt") as opened:
            return opened.get_tensor(name)

    def shape(self, name: str) -> tuple[int, ...]:
        with safe_open(self.files[name], framework="pt") as opened:
            return tuple(opened.get_slice(name).get_shape())


def _file(place: str, name: str) -> Path | None:
    folder = Path(place)
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    if place.count("/") > 1 or folder.is_absolute():
        return None
    cached = try_to_load_from_cache(place, name)
    return Path(cached) if isinstance(cached, str) else None
