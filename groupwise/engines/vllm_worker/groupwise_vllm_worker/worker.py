"""The methods that `/collective_rpc` calls on each worker. Seen with vLLM 0.32 on a CPU; the calls that it makes are
those of 0.33, too, where they were read and not run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .fold import folds
from .folder import apply, check, read_manifest, verified
from .group import Group, arrive, met, nccl_version
from .mapped import check_list, dtype_of, mapped, parts_of

Result = dict[str, Any]


class GroupwiseWorker:
    """Mixed into vLLM's worker, whose `model_runner` has the model.

    Methods answer with data, because an exception in a worker ends the whole engine: `tensors`, `bytes` and `seconds`;
    or `error`, and `touched`: whether the model may have changed.
    """

    model_runner: Any
    _groupwise_held: tuple[int, dict[str, Tensor]] | None = None
    _groupwise_group: Group | None = None

    def groupwise_load(self, path: str, version: int) -> Result:
        """Take the weights of a Hugging Face folder, once every byte is what its manifest says."""
        return self._groupwise_taken(lambda: verified(Path(path), version))

    def groupwise_change(self, folders: Sequence[str], version: int) -> Result:
        """Take the weights of a Hugging Face folder with the changes of the others laid over it, each over the one
        before. A copy stays in the host's memory, so that next time only what is new is read."""

        def found() -> Mapping[str, Tensor]:
            held, self._groupwise_held = self._groupwise_held, None  # which is of no version while it is changed
            tensors = changed([Path(folder) for folder in folders], version, held)
            self._groupwise_held = version, tensors
            return tensors

        return self._groupwise_taken(found)

    def groupwise_map(self, storages: Sequence[dict[str, Any]], entries: Sequence[Any], digest: str) -> Result:
        """Take weights that lie in the trainer's memory, once each has its checksum there."""
        return self._groupwise_taken(lambda: mapped(storages, entries, digest))

    def groupwise_hello(self, group: str) -> Result:
        """Whether it is in a group of that name, and what it would join one with."""
        mine = self._groupwise_group
        return {"in_group": mine is not None and mine.name == group, "nccl": nccl_version()}

    def groupwise_receive(self, meeting: dict[str, Any], buckets: Sequence[Any], digest: str, turn: int) -> Result:
        """Take weights that the trainer broadcasts in buckets: first to compare them, then, if they are more than one,
        again to load them. Memory for one bucket is needed for the first, and for those of one layer for the second.

        Args:
            meeting: where the group meets; a worker that is in it stays.
            buckets: of each, its tensors' name, type, shape and checksum.
            turn: a number that is new for each call.
        """
        held: list[Tensor] = []
        try:
            check_list(buckets, digest)
            group = self._groupwise_joined(meeting)
            wrong = ""
            for bucket in buckets:
                flat = _received(group, bucket)
                wrong = wrong or _wrong(flat, bucket)
                held = [flat] if len(buckets) == 1 else []
            group.said(turn, wrong)
            go_on = group.decided(turn)
        except Exception as error:  # noqa: BLE001 - see above
            self._groupwise_left()
            return _failed(error, touched=False)
        if wrong or not go_on:
            return {"error": wrong or "another worker got other weights than were sent", "touched": False}

        def again() -> Iterator[tuple[str, Tensor]]:
            for bucket in buckets:
                flat = held.pop() if held else _received(group, bucket)
                if wrong := _wrong(flat, bucket):
                    raise ValueError(wrong)
                yield from parts_of(flat, bucket)

        size = sum(_bytes(bucket) for bucket in buckets)
        found = self._groupwise_loaded(again, count=sum(map(len, buckets)), size=size)
        if found.get("error"):
            self._groupwise_left()
        return found

    def _groupwise_joined(self, meeting: dict[str, Any]) -> Group:
        mine = self._groupwise_group
        if mine is not None and mine.name == meeting["name"]:
            return mine
        self._groupwise_left()
        store = met(meeting["host"], meeting["port"], meeting["seconds"])
        rank = arrive(store, meeting["name"])
        self._groupwise_group = Group(
            store,
            meeting["name"],
            rank=rank,
            size=meeting["size"],
            backend=meeting["backend"],
            seconds=meeting["seconds"],
        )
        return self._groupwise_group

    def _groupwise_left(self) -> None:
        group, self._groupwise_group = self._groupwise_group, None
        if group is not None:
            group.leave()

    def _groupwise_taken(self, find: Callable[[], Mapping[str, Tensor]]) -> Result:
        try:
            found = find()
        except Exception as error:  # noqa: BLE001
            return _failed(error, touched=False)
        size = sum(tensor.numel() * tensor.element_size() for tensor in found.values())
        return self._groupwise_loaded(lambda: iter(found.items()), count=len(found), size=size)

    def _groupwise_loaded(
        self, weights: Callable[[], Iterator[tuple[str, Tensor]]], *, count: int, size: int
    ) -> Result:
        started = time.perf_counter()
        try:
            self.model_runner.reload_weights(weights_iterator=weights())
            _pack_tied_head(self.model_runner.get_model())
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # the trainer may change what was read, once this has answered
        except Exception as error:  # noqa: BLE001
            return _failed(error, touched=True)
        return {"tensors": count, "bytes": size, "seconds": time.perf_counter() - started}


def changed(folders: Sequence[Path], version: int, held: tuple[int, dict[str, Tensor]] | None) -> dict[str, Tensor]:
    """The weights of the last folder, by all that are needed.

    Args:
        held: a version, and its weights, which are changed in place where it is one of the folders'.

    Raises:
        ValueError: they are not what the manifest says.
    """
    manifests = [read_manifest(folder) for folder in folders]
    versions = [manifest["version"] for manifest in manifests]
    if versions[-1] != version:
        raise ValueError(f"{folders[-1]} has version {versions[-1]!r}; expected {version}")
    if held is not None and held[0] in versions:
        first, tensors = versions.index(held[0]), held[1]
    else:
        first, tensors = 0, verified(folders[0], versions[0])
    for folder, manifest, before in zip(folders[first + 1 :], manifests[first + 1 :], versions[first:], strict=False):
        if manifest.get("base") != before:
            raise ValueError(f"{folder} changes version {manifest.get('base')!r}, and {before} is there")
        apply(folder, tensors)
    check(tensors, manifests[-1]["tensors"], folders[-1])
    return tensors


def _received(group: Group, bucket: Sequence[Any]) -> Tensor:
    """A bucket's bytes, in memory of their own: vLLM keeps what it read until a layer is whole."""
    device = "cuda" if group.backend == "nccl" else "cpu"
    flat = torch.empty(_bytes(bucket), dtype=torch.uint8, device=device)
    group.broadcast(flat)
    return flat


def _bytes(bucket: Sequence[Any]) -> int:
    return sum(torch.Size(shape).numel() * dtype_of(kind).itemsize for _, kind, shape, _ in bucket)


def _wrong(flat: Tensor, bucket: Sequence[Any]) -> str:
    """Which tensor is not what was sent; empty: none."""
    got = folds(tensor for _, tensor in parts_of(flat, bucket))
    pairs = zip(bucket, got, strict=True)
    return next((f"{e[0]} has the checksum {sum_}, and {e[3]} was sent" for e, sum_ in pairs if sum_ != e[3]), "")


def _failed(error: Exception, *, touched: bool) -> Result:
    return {"error": f"{type(error).__name__}: {error}", "touched": touched}


def _pack_tied_head(model: Any) -> None:
    """A head that shares the embedding's weights has a packed copy of them on a CPU, which a reload does not renew:
    greedy answers change, and log-probs are off by up to 0.74 nat."""
    head = getattr(model, "lm_head", None)
    method = getattr(head, "quant_method", None)
    if method is not None and model.config.get_text_config().tie_word_embeddings:
        method.process_weights_after_loading(head)
