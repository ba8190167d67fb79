"""A state as JSON and named tensors, and back, losing nothing: what comes back equals what went in, types included.

A state is nested dicts, lists and tuples of None, booleans, numbers, texts and tensors. What JSON cannot say is a table
with one key that begins with `$`: `{"$tensor": name}`, `{"$tuple": […]}`, `{"$float": "nan"}`, and
`{"$dict": [[key, value], …]}` for a dict whose keys are not all plain text.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


class CodecError(ValueError):
    """A state holds something that cannot be stored; the message says where and what."""


@dataclass(frozen=True, slots=True)
class EncodedState:
    """JSON-ready structure, and the tensors that it refers to by name: on the CPU, contiguous, none sharing memory.

    Example:
        EncodedState({"step": 3, "lr": {"$tensor": "lr"}}, {"lr": tensor(0.1)})
    """

    structure: Any
    tensors: dict[str, Tensor]


def encode_state(state: Mapping[str, Any], name: str) -> EncodedState:
    """Take a state apart; `name` stands before the place in an error.

    Raises:
        CodecError: a value of another type, a tensor that is sparse or has no data, or a reference cycle.
    """
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    try:
        structure = _Encoder(name, tensors, seen).encode(state, "")
    except RecursionError:
        raise CodecError(f"the state of `{name}` contains itself or is nested too deeply") from None
    return EncodedState(structure, tensors)


def decode_state(structure: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Put a state together again."""
    if isinstance(structure, list):
        return [decode_state(item, tensors) for item in structure]
    if not isinstance(structure, dict):
        return structure
    if len(structure) == 1:
        ((kind, content),) = structure.items()
        if kind == "$tensor":
            return tensors[content]
        if kind == "$tuple":
            return tuple(decode_state(item, tensors) for item in content)
        if kind == "$float":
            return float(content)
        if kind == "$dict":
            return {decode_state(key, tensors): decode_state(value, tensors) for key, value in content}
    return {key: decode_state(value, tensors) for key, value in structure.items()}


class _Encoder:
    def __init__(self, name: str, tensors: dict[str, Tensor], storages: set[int]) -> None:
        self.name = name
        self.tensors = tensors
        self.storages = storages

    def encode(self, value: Any, place: str) -> Any:
        if value is None or isinstance(value, bool | int | str):
            return _checked(value, f"{self.name}{place}")
        if isinstance(value, float):
            return float(value) if math.isfinite(value) else {"$float": str(float(value))}
        if isinstance(value, Tensor):
            return {"$tensor": self._keep(value, place)}
        if isinstance(value, list):
            return [self.encode(item, f"{place}.{index}") for index, item in enumerate(value)]
        if isinstance(value, tuple):
            return {"$tuple": [self.encode(item, f"{place}.{index}") for index, item in enumerate(value)]}
        if isinstance(value, Mapping):
            return self._encode_mapping(value, place)
        raise CodecError(
            f"got a {type(value).__module__}.{type(value).__qualname__} at {self.name}{place}; expected None, a bool, "
            "an int, a float, a text, a tensor, or a dict, list or tuple of these"
        )

    def _encode_mapping(self, value: Mapping[Any, Any], place: str) -> Any:
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {
                _checked(key, f"{self.name}{place}"): self.encode(item, f"{place}.{key}") for key, item in value.items()
            }
        items = [
            [self.encode(key, f"{place}.<key>"), self.encode(item, f"{place}.{key}")] for key, item in value.items()
        ]
        return {"$dict": items}

    def _keep(self, tensor: Tensor, place: str) -> str:
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
            raise CodecError(
                f"got a tensor of layout {tensor.layout} on {tensor.device} at {self.name}{place}; "
                "expected a dense tensor that holds data"
            )
        plain = tensor.detach().to("cpu").resolve_conj().resolve_neg().contiguous()
        storage = plain.untyped_storage()
        # A view would store its whole base, and safetensors refuses two names for one memory.
        if storage.nbytes() != plain.nbytes or storage.data_ptr() in self.storages:
            plain = plain.clone()
        self.storages.add(plain.untyped_storage().data_ptr())
        key = place.removeprefix(".") or "tensor"
        while key in self.tensors:
            key += "'"
        self.tensors[key] = plain
        return key


def _checked(value: Any, place: str) -> Any:
    """Plain built-ins only: a subclass (an enum, a NumPy text) would come back as something else."""
    if isinstance(value, str):
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise CodecError(f"got a text that is not valid Unicode at {place}")
        return str.__str__(value)
    return value if value is None or isinstance(value, bool) else int(value)
