"""An engine's process that is the run's own: started from its own environment, watched, ended with the run."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import httpx

from groupwise.config import RolloutConfig
from groupwise.engines import watchdog
from groupwise.engines.commands import Command
from groupwise.engines.weights import WeightRef
from groupwise.errors import ConfigError, EngineError

logger = logging.getLogger(__name__)

_END_SECONDS = 20.0
_TOLD_LINES = 8
_TELLING = re.compile(r"error|exception|not supported|cannot|failed|out of memory|no such", re.IGNORECASE)


class EngineProcess:
    """One server's process; implements `groupwise.engines.member.Launcher`.

    Args:
        command: the command line for a version of the weights.
        url: where it will answer.
        health: the route that answers once it is ready.
        log: gets all that it prints.
        ready_seconds: longest wait until then.

    Example:
        process = EngineProcess(command, url="http://127.0.0.1:8000", health="/health", log=log, ready_seconds=600)
        await process.start(ref)
    """

    def __init__(
        self, command: Callable[[WeightRef], Command], *, url: str, health: str, log: Path, ready_seconds: float
    ) -> None:
        self.url = url
        self._command = command
        self._health = health
        self._log = log
        self._ready_seconds = ready_seconds
        self._dog: subprocess.Popen[str] | None = None
        self._started = 0

    async def start(self, ref: WeightRef) -> None:
        """Returns once it answers.

        Raises:
            ConfigError: the first start came to nothing; with what its log says.
            EngineError: a later one did.
        """
        await self.kill()
        command = self._command(ref)
        self._log.parent.mkdir(parents=True, exist_ok=True)
        begun = self._log.stat().st_size if self._log.exists() else 0
        logger.info("starting %s (log: %s)", command.shell(), self._log)
        self._dog = subprocess.Popen(
            [sys.executable, "-I", str(Path(watchdog.__file__)), str(self._log), json.dumps(command.words)],
            stdin=subprocess.PIPE,
            env=command.full_environment(),
            text=True,
            start_new_session=True,
        )
        self._started += 1
        started = time.monotonic()
        async with httpx.AsyncClient() as client:
            while not await self._answers(client):
                waited = time.monotonic() - started
                if self.alive() and waited < self._ready_seconds:
                    await asyncio.sleep(0.2)
                    continue
                ended = "it ended" if not self.alive() else "it did not answer"
                await self.kill()
                kind = ConfigError if self._started == 1 else EngineError
                raise kind(
                    f"the engine was not ready: {ended} after {waited:.0f} s (rollout.launch.ready_seconds = "
                    f"{self._ready_seconds:g}); {self._log} says:\n{_telling(self._log, begun)}"
                )
        logger.info("the engine at %s is ready after %.1f s", self.url, time.monotonic() - started)

    async def _answers(self, client: httpx.AsyncClient) -> bool:
        try:
            return (await client.get(self.url + self._health, timeout=5)).is_success and self.alive()
        except httpx.HTTPError:
            return False

    def alive(self) -> bool:
        """Whether the process is there; not whether it answers."""
        return self._dog is not None and self._dog.poll() is None

    async def kill(self) -> None:
        """At once, with all that it started."""
        await self._end("kill\n")

    async def stop(self) -> None:
        """As Ctrl-C would; after ten seconds, for good."""
        await self._end("")

    async def _end(self, word: str) -> None:
        dog, self._dog = self._dog, None
        if dog is None or dog.stdin is None:
            return
        try:
            dog.stdin.write(word)
            dog.stdin.close()
        except OSError:
            pass  # it is gone already
        try:
            await asyncio.to_thread(dog.wait, _END_SECONDS)
        except subprocess.TimeoutExpired:
            dog.kill()
            logger.warning("the engine's watchdog did not end; its process group is left to the system")


def ports(rollout: RolloutConfig) -> list[int]:
    """One for each server.

    Raises:
        ConfigError: one that is asked for is taken.
    """
    launch = rollout.launch
    if not launch.port:
        return free_ports(launch.replicas)
    wanted = list(range(launch.port, launch.port + launch.replicas))
    for port in wanted:
        with socket.socket() as taken:
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                taken.bind(("127.0.0.1", port))
            except OSError as error:
                raise ConfigError(
                    f"rollout.launch.port = {launch.port}: port {port} is taken ({error.strerror}); give another, or "
                    "leave it out for free ones"
                ) from error
    return wanted


def free_ports(count: int) -> list[int]:
    """Of the loopback address, free at this moment, all different."""
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    found: list[int] = [each.getsockname()[1] for each in held]
    for each in held:
        each.close()
    return found


def shared_out(gpus: Sequence[str], replicas: int) -> list[tuple[str, ...] | None]:
    """The GPUs of each server.

    Raises:
        ConfigError: they cannot be shared out evenly.
    """
    if not gpus:
        return [None] * replicas
    if len(gpus) % replicas:
        raise ConfigError(
            f"rollout.launch.gpus has {len(gpus)}, and rollout.launch.replicas = {replicas}; give as many to each"
        )
    each = len(gpus) // replicas
    return [tuple(gpus[number * each : (number + 1) * each]) for number in range(replicas)]


def _telling(log: Path, begun: int) -> str:
    """The lines that say most likely why, of this start."""
    try:
        with log.open("rb") as stream:
            stream.seek(begun)
            lines = stream.read().decode(errors="replace").splitlines()
    except OSError:
        lines = []
    lines = [line.strip() for line in lines if line.strip()]
    telling = [line for line in lines if _TELLING.search(line)]
    return "\n".join((telling or lines)[-_TOLD_LINES:])
