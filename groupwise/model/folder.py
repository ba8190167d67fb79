"""Model folders come from anywhere: what is wrong in one is said in a sentence, and none fills the memory.

A boundary module: other people's loaders raise anything over other people's files.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from groupwise.config import ModelConfig
from groupwise.errors import ConfigError, GroupwiseError
from groupwise.texts import first_line, one_line

P = ParamSpec("P")
T = TypeVar("T")
_MOST_TIMES = 16  # packed 4-bit weights are stored as an eighth of what they stand for
_SPARE = 10_000_000  # numbers; buffers are not stored


def told_of_folder(load: Callable[Concatenate[ModelConfig, P], T]) -> Callable[Concatenate[ModelConfig, P], T]:
    """The loader, with every error about `config.path` as a ConfigError."""

    @wraps(load)
    def told(config: ModelConfig, *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return load(config, *args, **kwargs)
        except GroupwiseError:
            raise
        except Exception as error:  # see the module's text
            raise ConfigError(f"model.path = {config.path!r} could not be loaded: {_said(error)}") from error

    return told


def _said(error: Exception) -> str:
    text = first_line(error)
    if "trust_remote_code" in str(error):
        return (
            "it comes with code of its own, which may do anything; read it, and set model.trust_remote_code to run it"
        )
    if isinstance(error, OSError | ValueError):
        return one_line(text, limit=400)
    return f"{type(error).__name__}: {one_line(text, limit=400)}"


def check_sizes(path: str, config: PreTrainedConfig, *, trust_remote_code: bool) -> None:
    """Refuse a config.json that asks for far more weights than the folder has, before memory is taken for them.

    Raises:
        ConfigError: it does.
        ValueError: a file of weights is damaged.
    """
    files = sorted(Path(path).glob("*.safetensors"))
    if not files:  # a Hub name, or weights of another kind
        return
    shapes = [shape for file in files for shape in stored_shapes(file)]
    layers: Any = getattr(config.get_text_config(), "num_hidden_layers", 0)
    stored = sum(math.prod(shape) for shape in shapes)
    wanted: float = layers if isinstance(layers, int) and layers > len(shapes) else 0
    if not wanted:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        wanted = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
        if wanted <= _MOST_TIMES * stored + _SPARE:
            return
        raise ConfigError(
            f"model.path = {path!r}: config.json asks for {wanted:,} weights, and the files have {stored:,}"
        )
    raise ConfigError(f"model.path = {path!r}: config.json asks for {layers:,} layers, and has {len(shapes):,} tensors")


def stored_shapes(file: Path) -> list[list[int]]:
    """The shapes in a safetensors file, from its head alone.

    Raises:
        ValueError: it is damaged.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as content:
            (length,) = struct.unpack("<Q", content.read(8))
            if length > size - 8:
                raise ValueError(f"it is cut short: it has {size:,} bytes, and its head alone {length:,}")
            head: dict[str, Any] = json.loads(content.read(length))
        shapes = [entry["shape"] for name, entry in head.items() if name != "__metadata__"]
        ends = [entry["data_offsets"][1] for name, entry in head.items() if name != "__metadata__"]
        if ends and max(ends) > size - 8 - length:
            raise ValueError(
                f"it is cut short: it has {size:,} bytes, and its weights end at {8 + length + max(ends):,}"
            )
        assert all(isinstance(side, int) for shape in shapes for side in shape), "a shape is a list of whole numbers"
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        IndexError,
        AttributeError,
        AssertionError,
        struct.error,
    ) as error:
        raise ValueError(f"{file}: got a damaged safetensors file ({_said(error)}); fetch or write it again") from error
    return shapes
