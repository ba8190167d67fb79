"""Shapes of models that programs name. The model folder's config.json decides; these are compared with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Self

from groupwise.compat.xtuner.base import Names
from groupwise.errors import ConfigError


class ModelPreset(Names):
    """What a program says of the model's shape; None says nothing."""

    model_type: str | None = None
    vocab_size: int | None = None
    hidden_size: int | None = None
    intermediate_size: int | None = None
    num_hidden_layers: int | None = None
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    tie_word_embeddings: bool | None = None

    @classmethod
    def from_hf(cls, hf_path: str | Path) -> Self:
        """The shape that the folder's config.json has.

        Raises:
            ConfigError: there is no such folder, or its config.json cannot be read.
        """
        found = _folder_config(Path(hf_path))
        if found is None:
            raise ConfigError(f"{hf_path}: got no folder with a config.json; expected a Hugging Face model folder")
        return cls(**{name: found[name] for name in cls.model_fields if found.get(name) is not None})

    def disagreements(self, folder: str | Path) -> list[str]:
        """`hidden_size = 4096, and the folder has 64`; nothing where the folder is not on this machine."""
        found = _folder_config(Path(folder)) or {}
        return [
            f"{name} = {value!r}, and the folder has {found[name]!r}"
            for name, value in self
            if value is not None and found.get(name) is not None and found[name] != value
        ]


def _folder_config(folder: Path) -> dict[str, Any] | None:
    file = folder / "config.json"
    try:
        content = json.loads(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read: {error}; expected a model's config.json") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{file}: got {type(content).__name__}; expected a table, as transformers writes it")
    return content


def get_model_config_from_hf(model_path: str | Path) -> ModelPreset:
    """As XTuner's function of this name: the shape of a model folder, of any architecture."""
    return ModelPreset.from_hf(model_path)


class Qwen3DenseConfig(ModelPreset):
    model_type: str | None = "qwen3"


class _Qwen3(Qwen3DenseConfig):
    vocab_size: int | None = 151936
    num_key_value_heads: int | None = 8
    head_dim: int | None = 128


class Qwen3Dense8BConfig(_Qwen3):
    hidden_size: int | None = 4096
    intermediate_size: int | None = 12288
    num_hidden_layers: int | None = 36
    num_attention_heads: int | None = 32
    tie_word_embeddings: bool | None = False


class Qwen3Dense4BConfig(_Qwen3):
    hidden_size: int | None = 2560
    intermediate_size: int | None = 9728
    num_hidden_layers: int | None = 36
    num_attention_heads: int | None = 32
    tie_word_embeddings: bool | None = True


class Qwen3Dense0P6BConfig(_Qwen3):
    hidden_size: int | None = 1024
    intermediate_size: int | None = 3072
    num_hidden_layers: int | None = 28
    num_attention_heads: int | None = 16
    tie_word_embeddings: bool | None = True


class Qwen2DenseConfig(ModelPreset):
    model_type: str | None = "qwen2"


class Qwen2Dense7BConfig(Qwen2DenseConfig):
    vocab_size: int | None = 152064
    hidden_size: int | None = 3584
    intermediate_size: int | None = 18944
    num_hidden_layers: int | None = 28
    num_attention_heads: int | None = 28
    num_key_value_heads: int | None = 4
    tie_word_embeddings: bool | None = False
