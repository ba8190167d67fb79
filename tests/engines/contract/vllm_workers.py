"""The workers of the server that answers as vLLM: Groupwise's extension itself, over the served model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from groupwise.engines.vllm_worker.groupwise_vllm_worker import GroupwiseWorker
from groupwise.weight_sync.folder import MANIFEST
from tests.engines.contract.model import ServedModel


class Runner:
    """What vLLM's worker has as `model_runner`, over the served model."""

    def __init__(self, model: ServedModel) -> None:
        self.model = model

    def reload_weights(self, weights_iterator: Iterator[tuple[str, Tensor]]) -> None:
        self.model.load(dict(weights_iterator))

    def get_model(self) -> object:
        """Its packed head is the served model's own affair."""
        return object()


class Worker(GroupwiseWorker):
    """Groupwise's worker extension itself, in a worker of this server."""

    def __init__(self, model: ServedModel) -> None:
        self.model_runner = Runner(model)

    def groupwise_load(self, path: str, version: int | str | None = None) -> dict[str, Any]:
        """Also a folder without a manifest, where no version is asked for."""
        if version is not None and (Path(path) / MANIFEST).exists():
            return super().groupwise_load(path, int(version))
        loaded = self.model_runner.model.load_folder(path)
        return {"tensors": loaded.tensors, "bytes": loaded.bytes}

    def reload_weights(self, weights_path: str) -> None:
        """vLLM's own, which checks nothing."""
        self.model_runner.model.load_folder(weights_path)


EXTENSION = frozenset(
    {
        *("groupwise_load", "groupwise_change", "groupwise_map", "groupwise_hello", "groupwise_receive"),
        "reload_weights",
    }
)
