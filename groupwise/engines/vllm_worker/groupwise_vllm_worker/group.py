"""A group of the trainer and the workers of one server, beside whatever groups they have already.

The trainer holds the store and is rank 0. Every wait has its end: who is lost in the middle holds nobody else for
longer. Its parts in the store are named as torch's own `_new_process_group_helper` names them, so engines that use
that join it, too.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]

_PAUSE = 0.0005
_BLOCKING = "TORCH_NCCL_BLOCKING_WAIT"
"""Without it, torch ends the whole process where NCCL waits for too long."""


class Stopped(Exception):
    """Nothing more is to be sent."""


class Group:
    """Ranks that broadcast from rank 0.

    Args:
        name: new for each group.
        backend: gloo for tensors on a CPU, nccl for those on GPUs.
        seconds: longest wait for the others, and for each broadcast.

    Raises:
        RuntimeError: the others did not come.
    """

    def __init__(self, store: TCPStore, name: str, *, rank: int, size: int, backend: str, seconds: float) -> None:
        self.store = store
        self.name = name
        self.backend = backend
        self.size = size
        self.seconds = seconds
        inner = PrefixStore(f"{name}/", PrefixStore(name, store))
        place = "cpu" if backend == "gloo" else "cuda"
        self._ranks: Any = _joined(backend, PrefixStore(f"{place}/", inner), rank, size, seconds)

    def broadcast(self, tensor: Tensor, stopped: Callable[[], bool] = lambda: False) -> None:
        """From rank 0 to all.

        Raises:
            Stopped: so `stopped` says.
            RuntimeError: another rank is gone, or was waited for in vain.
        """
        from torch.distributed import BroadcastOptions

        options = BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        if self._ranks is None:
            raise RuntimeError(f"the group {self.name} was left")
        work = self._ranks.broadcast([tensor], options)
        end = time.monotonic() + self.seconds
        while not work.is_completed():
            if stopped() or time.monotonic() > end:
                self.leave()
                raise Stopped if stopped() else RuntimeError(f"a broadcast took more than {self.seconds:g} s")
            time.sleep(_PAUSE)
        work.wait()

    def said(self, turn: int, verdict: str) -> None:
        """A worker's verdict on what it got; empty: all is right."""
        number = self.store.add(f"{self.name}/{turn}/verdicts", 1)
        self.store.set(f"{self.name}/{turn}/verdict/{number}", verdict)

    def verdicts(self, turn: int, stopped: Callable[[], bool]) -> list[str]:
        """Those of all workers.

        Raises:
            Stopped, RuntimeError: as `broadcast`.
        """
        keys = [f"{self.name}/{turn}/verdict/{number}" for number in range(1, self.size)]
        wait_for(self.store, keys, self.seconds, stopped)
        return [self.store.get(key).decode() for key in keys]

    def decide(self, turn: int, go_on: bool) -> None:
        """The trainer's decision on all verdicts."""
        self.store.set(f"{self.name}/{turn}/decision", "go on" if go_on else "stop")

    def decided(self, turn: int) -> bool:
        """
        Raises:
            RuntimeError: the trainer did not say.
        """
        key = f"{self.name}/{turn}/decision"
        wait_for(self.store, [key], self.seconds)
        return self.store.get(key) == b"go on"

    def leave(self) -> None:
        """What is under way comes to nothing."""
        ranks, self._ranks = self._ranks, None
        if ranks is not None:
            ranks.abort()


def wait_for(store: TCPStore, keys: list[str], seconds: float, stopped: Callable[[], bool] = lambda: False) -> None:
    """Until the store has them.

    Raises:
        Stopped: so `stopped` says.
        RuntimeError: it has them not in time.
    """
    end = time.monotonic() + seconds
    while not store.check(keys):
        if stopped():
            raise Stopped
        if time.monotonic() > end:
            raise RuntimeError(f"{keys[-1]} did not come within {seconds:g} s")
        time.sleep(0.002)


def met(host: str, port: int, seconds: float) -> TCPStore:
    """The trainer's store.

    Raises:
        RuntimeError: nothing is there.
    """
    return TCPStore(host, port, None, False, timedelta(seconds=seconds))


def arrive(store: TCPStore, name: str) -> int:
    """Tell that this process is there; the rank that it gets, from 1."""
    rank = store.add(f"{name}/ranks", 1)
    store.set(f"{name}/here/{rank}", "")
    return rank


def arrived(store: TCPStore, name: str, workers: int, seconds: float, stopped: Callable[[], bool]) -> None:
    """Until all workers are there.

    Raises:
        Stopped, RuntimeError: as `wait_for`.
    """
    wait_for(store, [f"{name}/here/{rank}" for rank in range(1, workers + 1)], seconds, stopped)


def _joined(backend: str, store: Any, rank: int, size: int, seconds: float) -> Any:
    wait = timedelta(seconds=seconds)
    if backend == "gloo":
        from torch.distributed import ProcessGroupGloo

        return ProcessGroupGloo(store, rank, size, wait)
    from torch.distributed import ProcessGroupNCCL

    before = os.environ.get(_BLOCKING)
    os.environ[_BLOCKING] = "1"
    try:
        options = ProcessGroupNCCL.Options()
        options._timeout = wait
        return ProcessGroupNCCL(store, rank, size, options)
    finally:
        if before is None:
            del os.environ[_BLOCKING]
        else:
            os.environ[_BLOCKING] = before


def nccl_version() -> str:
    """Of this process; all of a group must have the same one. Empty where there is none."""
    if not torch.cuda.is_available():
        return ""
    found: Any = cast(Any, torch.cuda).nccl.version()
    return ".".join(map(str, found))
