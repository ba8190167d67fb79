"""A version of the policy on its way to an engine."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

WeightKind: TypeAlias = Literal["tensors", "model", "adapter"]
"""What a folder holds: tensors by the policy's own names; a Hugging Face model; an adapter beside its base."""

Entry: TypeAlias = Sequence[Any]
"""A tensor in a list that is sent as JSON: name, type as torch names it, shape, and what else the list has."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Weights that lie in this process's memory, told in JSON: what `groupwise_map` of vLLM's worker takes.

    Attributes:
        storages: of each, how another process opens it.
        entries: of each tensor: name, type, shape, strides, storage, byte where it begins there, checksum.
        digest: of `entries`.
    """

    storages: Sequence[Mapping[str, Any]]
    entries: Sequence[Entry]
    digest: str


@dataclass(frozen=True, slots=True)
class Meeting:
    """Where a group meets.

    Attributes:
        size: this process and every worker of the server.
        seconds: longest wait for one of them.
    """

    host: str
    port: int
    name: str
    size: int
    backend: str
    seconds: float


class Broadcast(Protocol):
    """Weights that this process broadcasts to the workers of one server at a time.

    Attributes:
        buckets: of each, its tensors' name, type, shape and checksum; all of a bucket are of one type.
        digest: of `buckets`.
        backend: gloo or nccl.
        nccl: this process's version of it; empty without.
    """

    @property
    def nccl(self) -> str: ...

    @property
    def buckets(self) -> Sequence[Sequence[Entry]]: ...

    @property
    def digest(self) -> str: ...

    @property
    def backend(self) -> str: ...

    def group_of(self, url: str) -> str | None:
        """The name of the group that the server may be in still."""
        ...

    async def meet(self, url: str, *, workers: int, join: Callable[[Meeting], Awaitable[Any]]) -> None:
        """A group with the server's workers, who come to it while `join` waits.

        Raises:
            EngineError: they did not come.
        """
        ...

    async def send(self, url: str, number: int, take: Callable[[], Awaitable[Any]], *, typed: bool) -> Any:
        """One bucket, to those who wait for it while `take` does; its answer.

        Args:
            typed: as elements of the bucket's type; else as bytes.

        Raises:
            EngineError: they are gone, or do not take it in time.
        """
        ...

    async def send_compared(
        self, url: str, take: Callable[[Meeting, int], Awaitable[Any]], *, workers: int, anew: bool
    ) -> Any:
        """All of it, to workers that compare what they get before they load it; the answer of `take`.

        Args:
            take: gets the number of this turn.
            anew: they are in no group.

        Raises:
            EngineError: they are gone, or do not take it in time.
        """
        ...

    def drop(self, url: str) -> None:
        """Forget the server's group: the next one has another name."""
        ...


@dataclass(frozen=True, slots=True)
class WeightRef:
    """Weights that have a number, and how a server gets them.

    Attributes:
        folder: that trainer and engine see under one name, and whose manifest names every byte. Without any of the
            ways below it has these weights; with one, a server that is started begins with it.
        bytes: that are made for the way.
        changes: folders to be laid over `folder`, one after another; None: it does not change by them.

    Example:
        WeightRef(17, Path("/dev/shm/run/version_000017"), "model", bytes=1_192_135_096)
    """

    version: int
    folder: Path
    kind: WeightKind
    bytes: int
    changes: tuple[Path, ...] | None = None
    memory: Memory | None = None
    broadcast: Broadcast | None = None

    @property
    def newest(self) -> Path:
        """The folder that was written for this version, where it travels by folders."""
        return self.changes[-1] if self.changes else self.folder
