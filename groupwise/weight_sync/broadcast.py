"""Weights that are broadcast to servers: by NCCL from GPU to GPU, by Gloo where the policy is on a CPU.

Each server's workers and this process are a group of their own, so a server that is lost, or slow, is no matter of the
others. It meets at a port of this machine, and stays for as long as all goes well; a server that was started again is
in none, and meets in a new one.
"""

from __future__ import annotations

import asyncio
import socket
import threading
import uuid
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar
from urllib.parse import urlsplit

import torch
from torch import Tensor
from torch.distributed import TCPStore

from groupwise.engines.vllm_worker.groupwise_vllm_worker.fold import folds
from groupwise.engines.vllm_worker.groupwise_vllm_worker.group import Group, Stopped, arrived, nccl_version
from groupwise.engines.vllm_worker.groupwise_vllm_worker.mapped import digest_of
from groupwise.engines.weights import Entry, Meeting, WeightRef
from groupwise.errors import EngineError
from groupwise.protocols import Policy
from groupwise.weight_sync.way import FirstFolder

T = TypeVar("T")
Named = Sequence[tuple[str, Tensor]]
Ends = Callable[[], bool]

BUCKET_BYTES = 2**30
"""Of tensors that travel together, or one tensor that is larger: so much memory is taken here, and by a worker."""

WAIT_SECONDS = 120.0
"""Longest wait for a worker: to come, to take a bucket, to say that it is right."""

_GRACE = 10.0
"""Seconds for the other side to say why it broke off."""


class Broadcasting:
    """Implements `groupwise.weight_sync.way.Way`.

    Args:
        first: what servers of the run's own start with.
    """

    def __init__(
        self, policy: Policy, first: FirstFolder, *, bucket_bytes: int = BUCKET_BYTES, seconds: float = WAIT_SECONDS
    ) -> None:
        self._policy = policy
        self._first = first
        self._bucket_bytes = bucket_bytes
        self._groups = Groups(seconds)
        self._newest: Parcel | None = None

    async def prepared(self, version: int) -> WeightRef:
        """See `Way`."""
        folder = await self._first.written(version)
        tensors = await self._policy.weights()
        self._newest = await asyncio.to_thread(Parcel.of, tensors, self._groups, self._bucket_bytes)
        size = sum(tensor.numel() * tensor.element_size() for _, tensor in tensors)
        return WeightRef(version, folder, "model", size, broadcast=self._newest)

    def taken(self, ref: WeightRef) -> int:
        """What was sent, to each worker and as often as it was; it can be sent again while the version is served."""
        assert self._newest is not None, "a version was prepared before it was taken"
        return self._newest.sent

    async def close(self) -> None:
        """See `Way`."""
        self._newest = None
        self._groups.close()
        await self._first.close()


@dataclass(slots=True)
class Parcel:
    """Implements `groupwise.engines.weights.Broadcast`; `of` makes it.

    Attributes:
        sent: bytes, to each worker.
    """

    buckets: list[list[Entry]]
    digest: str
    backend: str
    groups: Groups
    tensors: list[list[Tensor]]
    sent: int = 0

    @staticmethod
    def of(tensors: Named, groups: Groups, bucket_bytes: int) -> Parcel:
        """These tensors in buckets, each of one type and at most so many bytes, or of one tensor."""
        named = [(name, tensor.detach()) for name, tensor in tensors]
        checksums = folds(tensor for _, tensor in named)
        buckets: list[list[Entry]] = []
        held: list[list[Tensor]] = []
        room = 0
        for (name, tensor), checksum in zip(named, checksums, strict=True):
            size = tensor.numel() * tensor.element_size()
            if not buckets or size > room or held[-1][0].dtype != tensor.dtype:
                buckets.append([])
                held.append([])
                room = bucket_bytes
            buckets[-1].append([name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape), checksum])
            held[-1].append(tensor)
            room -= size
        backend = "nccl" if named[0][1].device.type == "cuda" else "gloo"
        return Parcel(buckets, digest_of(buckets), backend, groups, held)

    @property
    def nccl(self) -> str:
        """See `Broadcast`."""
        return nccl_version()

    def flat(self, number: int) -> Tensor:
        """A bucket's tensors one after another, `[N]` of their type."""
        parts = [tensor.contiguous().reshape(-1) for tensor in self.tensors[number]]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def group_of(self, url: str) -> str | None:
        """See `Broadcast`."""
        held = self.groups.joined.get(url)
        return None if held is None or held.backend != self.backend else held.name

    def drop(self, url: str) -> None:
        """See `Broadcast`."""
        self.groups.drop(url)

    async def meet(self, url: str, *, workers: int, join: Callable[[Meeting], Awaitable[Any]]) -> None:
        """See `Broadcast`."""
        meeting, store = self.groups.opened(url, workers, self.backend)

        def come(stopped: Ends) -> None:
            self._join(url, meeting, store, stopped)

        await self._together(url, join(meeting), come)

    async def send(self, url: str, number: int, take: Callable[[], Awaitable[T]], *, typed: bool) -> T:
        """See `Broadcast`."""
        group = self.groups.joined[url]
        return await self._together(url, take(), partial(self._broadcast, group, number, typed))

    async def send_compared(
        self, url: str, take: Callable[[Meeting, int], Awaitable[T]], *, workers: int, anew: bool
    ) -> T:
        """See `Broadcast`."""
        if anew:
            self.drop(url)
        store: TCPStore | None = None
        if (group := self.groups.joined.get(url)) is None:
            meeting, store = self.groups.opened(url, workers, self.backend)
        else:
            meeting = Meeting("", 0, group.name, group.size, group.backend, group.seconds)
        turn = self.groups.next_turn()

        def work(stopped: Ends) -> None:
            if store is not None:
                arrived(store, meeting.name, workers, meeting.seconds, stopped)
                self._join(url, meeting, store, stopped)
            self._send_all(self.groups.joined[url], turn, stopped)

        return await self._together(url, take(meeting, turn), work)

    def _join(self, url: str, meeting: Meeting, store: TCPStore, stopped: Ends) -> None:
        group = joined(meeting, store)
        if stopped():  # so late that nobody waits for it any more
            group.leave()
            raise Stopped
        self.groups.joined[url] = group

    def _send_all(self, group: Group, turn: int, stopped: Ends) -> None:
        """To be compared; and again, to be loaded, where it is more than one bucket."""
        for number in range(len(self.buckets)):
            self._broadcast(group, number, False, stopped)
        go_on = not any(group.verdicts(turn, stopped))
        group.decide(turn, go_on)
        if go_on and len(self.buckets) > 1:
            for number in range(len(self.buckets)):
                self._broadcast(group, number, False, stopped)

    def _broadcast(self, group: Group, number: int, typed: bool, stopped: Ends) -> None:
        flat = self.flat(number)
        if flat.device.type == "cuda":
            torch.cuda.set_device(flat.device)
        group.broadcast(flat if typed else flat.view(torch.uint8), stopped)
        self.sent += flat.numel() * flat.element_size() * (group.size - 1)

    async def _together(self, url: str, told: Awaitable[T], work: Callable[[Ends], None]) -> T:
        """The server's answer, while `work` does this side's part in a thread. Where either breaks off, so does the
        other, and the group is forgotten."""
        stopped = threading.Event()
        theirs = asyncio.ensure_future(told)
        mine = _in_a_thread(partial(work, stopped.is_set))
        try:
            await asyncio.wait({theirs, mine}, return_when=asyncio.FIRST_COMPLETED)
            if theirs.done():
                answer = theirs.result()
                await asyncio.wait_for(asyncio.shield(mine), _GRACE)
                return answer
            if mine.exception() is not None:  # the server may know why
                await asyncio.wait({theirs}, timeout=_GRACE)
                if theirs.done():
                    theirs.result()
                mine.result()
            return await theirs
        except (EngineError, Stopped, RuntimeError, TimeoutError) as error:
            stopped.set()
            await asyncio.wait({mine}, timeout=1.0)  # then nobody uses the group that is left
            self.drop(url)
            if isinstance(error, EngineError):
                raise
            said = str(error).partition(". This is typically")[0] or type(error).__name__  # gloo goes on for long
            raise EngineError(f"the weights did not reach {url}: {said}") from error
        finally:
            stopped.set()
            theirs.cancel()
            for future in (theirs, mine):
                future.add_done_callback(_seen)


@dataclass(slots=True)
class Groups:
    """The groups of this process, by server.

    Attributes:
        seconds: longest wait for a worker.
    """

    seconds: float
    joined: dict[str, Group] = field(default_factory=dict[str, Group])
    _turns: int = 0

    def opened(self, url: str, workers: int, backend: str) -> tuple[Meeting, TCPStore]:
        """A place to meet, under a new name.

        Raises:
            EngineError: nothing answers at `url`.
        """
        self.drop(url)
        store = TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=self.seconds), wait_for_workers=False)
        name = f"groupwise-{uuid.uuid4().hex}"
        return Meeting(_own_address(url), store.port, name, workers + 1, backend, self.seconds), store

    def next_turn(self) -> int:
        """A number that no call had."""
        self._turns += 1
        return self._turns

    def drop(self, url: str) -> None:
        """Leave the group of this server, where there is one."""
        if (group := self.joined.pop(url, None)) is not None:
            group.leave()

    def close(self) -> None:
        """Leave all."""
        for url in list(self.joined):
            self.drop(url)


def joined(meeting: Meeting, store: TCPStore) -> Group:
    """This process's place in the group, as rank 0.

    Raises:
        RuntimeError: the others did not come.
    """
    return Group(store, meeting.name, rank=0, size=meeting.size, backend=meeting.backend, seconds=meeting.seconds)


def _own_address(url: str) -> str:
    """By which the server at `url` reaches this machine."""
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        with socket.create_connection((parts.hostname or "", port), timeout=10) as reached:
            return str(reached.getsockname()[0])
    except OSError as error:
        raise EngineError(f"{url} does not answer: {error}") from error


def _in_a_thread(function: Callable[[], None]) -> asyncio.Future[None]:
    """One that the process does not wait for at its end: a wait for others may outlast it."""
    future: Future[None] = Future()

    def run() -> None:
        try:
            function()
        except BaseException as error:  # noqa: BLE001 - whoever waits for it raises it
            future.set_exception(error)
        else:
            future.set_result(None)

    threading.Thread(target=run, name="broadcast", daemon=True).start()
    return asyncio.wrap_future(future)


def _seen(future: asyncio.Future[Any]) -> None:
    with suppress(asyncio.CancelledError):
        future.exception()
