"""Weights as SGLang's and LMDeploy's `flattened_bucket` carries them: a base64 pickle of metadata and one flat tensor.

On a GPU the flat tensor travels as `reduce_tensor` makes it, a function of torch and its arguments (an IPC handle), and
the engine writes its own device into argument 6. Where there is no GPU, the same pair is that of a tensor on the CPU,
or the tensor itself. Only torch's and the bucket's own names are unpickled.
"""

from __future__ import annotations

import base64
import io
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.engines.contract.model import LoadFailed

METADATA = ("lmdeploy.utils", "FlattenedTensorMetadata")
"""Where the engine finds the class of an entry; a client's pickle must name this."""


@dataclass
class FlattenedTensorMetadata:
    """Which part of the flat tensor is whose; the fields are LMDeploy's."""

    name: str
    shape: torch.Size
    dtype: torch.dtype
    start_idx: int
    end_idx: int
    numel: int


class _Unpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        if (module_name, global_name) == METADATA:
            return FlattenedTensorMetadata
        if module_name.split(".")[0] in ("torch", "collections", "multiprocessing", "_codecs"):
            return super().find_class(module_name, global_name)
        raise ModuleNotFoundError(f"No module named {module_name!r}")


def named_tensors(serialized: Any, load_format: str | None) -> Mapping[str, Tensor]:
    """The tensors of a body's `serialized_named_tensors`; of a list, those of the first rank.

    Raises:
        LoadFailed: it is no such thing.
    """
    text = serialized[0] if isinstance(serialized, list) else serialized
    try:
        weights = _Unpickler(io.BytesIO(base64.b64decode(text))).load()
        if load_format != "flattened_bucket":
            return {name: _tensor(item) for name, item in weights}
        flat = _tensor(weights["flattened_tensor"])
        return {
            each.name: flat[each.start_idx : each.end_idx].view(each.dtype).reshape(each.shape)
            for each in weights["metadata"]
        }
    except Exception as error:  # whatever a stranger's pickle raises
        raise LoadFailed(f"{type(error).__name__}: {error}") from error


def _tensor(item: Any) -> Tensor:
    if isinstance(item, Tensor):
        return item
    function, arguments = item
    arguments = list(arguments)
    if len(arguments) > 6:
        arguments[6] = torch.cuda.current_device()
    return function(*arguments)


def bucket(tensors: Mapping[str, Tensor]) -> str:
    """What a client sends for these tensors, all of one type; the class of an entry is named as the engine's."""
    metadata, start = [], 0
    for name, tensor in tensors.items():
        end = start + tensor.numel()
        metadata.append(FlattenedTensorMetadata(name, tensor.shape, tensor.dtype, start, end, tensor.numel()))
        start = end
    flat = torch.cat([tensor.detach().flatten() for tensor in tensors.values()]).clone()
    # In this protocol a class is its module and name, each on a line of its own.
    pickled = pickle.dumps({"metadata": metadata, "flattened_tensor": flat}, protocol=2)
    own = (FlattenedTensorMetadata.__module__, FlattenedTensorMetadata.__qualname__)
    as_engine = pickled.replace(_global(*own), _global(*METADATA))
    return base64.b64encode(as_engine).decode()


def _global(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()
