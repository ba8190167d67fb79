"""One live process per run directory, on a shared disk too.

The owner of a folder is the file `.lock.<n>` with the highest n, written aside and linked into place, which one
process alone can do. A dead owner's is never removed to make room: the next owner makes n + 1. So of many who find the
same dead owner one wins, and nobody can take a live owner's file away by mistake. Ending well leaves the file, marked
as released.

Whether an owner lives: on the same machine, by its process and when that began; in another container of the same
machine, by a lock of the kernel's on the file; on another machine, by the file's time, which a live owner renews.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import re
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from groupwise.errors import CheckpointError, ConfigError

HEARTBEAT_SECONDS = 20.0
SILENT_SECONDS = 180.0
_LOCK = re.compile(r"\.lock\.(\d+)")
_ATTEMPTS = 100


@dataclass(frozen=True, slots=True)
class Owner:
    """A process that holds, or held, a folder.

    Attributes:
        started: the process's start, in clock ticks after the machine's; a later process with the same pid has another.
        boot: names the machine's boot. namespace: that in which `pid` is a process.
        released: it ended and said so.

    Example:
        Owner(host="node7", pid=4711, started="881234", boot="9c0e…", namespace="pid:[4026531836]", token="5f…")
    """

    host: str
    pid: int
    started: str
    boot: str
    namespace: str
    token: str
    released: bool = False

    @property
    def shown(self) -> str:
        return f"process {self.pid} on {self.host}"


@dataclass(slots=True)
class FolderLock:
    """A folder that this process holds.

    Example:
        with hold(Path("runs/one")) as lock:
            lock.confirm()          # before anything is written that another owner could write too
    """

    folder: Path
    number: int
    owner: Owner
    _descriptor: int
    _ended: threading.Event = field(default_factory=threading.Event)

    @property
    def file(self) -> Path:
        return self.folder / f".lock.{self.number}"

    def confirm(self) -> None:
        """Raises CheckpointError if another process took the folder, which it may after a long silence of this one."""
        newest = _newest(self.folder)
        if newest is None or newest[0] != self.number or newest[1].token != self.owner.token:
            other = "nobody" if newest is None else newest[1].shown
            raise CheckpointError(
                f"{self.folder}: this process no longer holds the run directory; {other} does. It was silent for more "
                f"than {SILENT_SECONDS:.0f} s, or its {self.file.name} was removed; nothing more is written"
            )

    def beat(self) -> None:
        while not self._ended.wait(HEARTBEAT_SECONDS):
            with suppress(OSError):
                os.utime(self.file)

    def release(self) -> None:
        self._ended.set()
        with suppress(OSError, CheckpointError):
            self.confirm()
            aside = self.folder / f".lock-{self.owner.token}"
            content = asdict(self.owner) | {"released": True}
            aside.write_text(json.dumps(content), encoding="utf-8")
            os.replace(aside, self.file)
        os.close(self._descriptor)


@contextmanager
def hold(folder: Path) -> Iterator[FolderLock]:
    """Hold the folder, which is made if it is missing, while the block runs.

    A folder that was made for it and stays empty is removed at the end.

    Raises:
        ConfigError: a live process holds it, or it cannot be made.
    """
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    lock = _acquire(folder)
    threading.Thread(target=lock.beat, name="groupwise-heartbeat", daemon=True).start()
    try:
        yield lock
    finally:
        lock.release()
        # Number 1 in a folder of one's own: nobody can have seen a dead owner here, so the count may begin again.
        if lock.number == 1 and made and {entry.name for entry in folder.iterdir()} == {lock.file.name}:
            lock.file.unlink()
            for place in made:
                with suppress(OSError):
                    place.rmdir()


def holder(folder: Path) -> str | None:
    """Who holds the folder, in words; None where no live process does. Changes nothing."""
    newest = _newest(folder) if folder.is_dir() else None
    if newest is None:
        return None
    number, owner = newest
    return _why_alive(folder / f".lock.{number}", owner)


def is_lock(name: str) -> bool:
    """Whether a file of this name belongs to the lock."""
    return name.startswith((".lock.", ".lock-"))


def refusal(folder: Path, alive: str) -> ConfigError:
    return ConfigError(
        f"{folder}: got a run directory that a live run writes: {alive}; wait for it or stop it, or choose another "
        "--output"
    )


def _acquire(folder: Path) -> FolderLock:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        owner = _this_process()
        aside = folder / f".lock-{owner.token}"
        descriptor = os.open(aside, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
    except OSError as error:
        raise ConfigError(f"train.output = {str(folder)!r}: cannot be made: {error}") from error
    try:
        os.write(descriptor, json.dumps(asdict(owner)).encode())
        os.fsync(descriptor)
        with suppress(OSError):  # some shared disks have none: a help, not the lock
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        number = _link(folder, aside)
        descriptor = _same_file(descriptor, folder / f".lock.{number}")
    except BaseException as error:
        os.close(descriptor)
        if isinstance(error, OSError):
            raise ConfigError(f"{folder}: the run directory cannot be locked: {error}") from error
        raise
    finally:
        aside.unlink(missing_ok=True)
    return FolderLock(folder, number, owner, descriptor)


def _link(folder: Path, aside: Path) -> int:
    """Give the owner's file the next number; of several who try it at once, one can."""
    for _ in range(_ATTEMPTS):
        newest = _newest(folder)
        number = 0 if newest is None else newest[0]
        if newest is not None and (alive := _why_alive(folder / f".lock.{number}", newest[1], clock=aside)):
            raise refusal(folder, alive)
        try:
            _create_once(aside, folder / f".lock.{number + 1}")
        except FileExistsError:
            continue
        if max(_numbers(folder)) > number + 1:  # it was seen dead, taken and cleaned up before this one came
            (folder / f".lock.{number + 1}").unlink(missing_ok=True)
            continue
        for old in _numbers(folder):
            if old <= number:
                (folder / f".lock.{old}").unlink(missing_ok=True)
        for entry in folder.glob(".lock-*"):
            if entry != aside and _seconds_silent(entry, clock=aside) > SILENT_SECONDS:
                entry.unlink(missing_ok=True)
        return number + 1
    raise ConfigError(f"{folder}: other processes take and leave the run directory all the time; try again later")


def _create_once(aside: Path, file: Path) -> None:
    """Raises FileExistsError if the file is there."""
    try:
        os.link(aside, file)
    except FileExistsError:
        raise
    except OSError:  # a disk without links: the file is there before its content is, for which readers wait
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(aside.read_bytes())


def _same_file(descriptor: int, file: Path) -> int:
    """The descriptor that the kernel's lock is held by: of the file itself, if it is no link to the one aside."""
    if os.path.sameopenfile(descriptor, opened := os.open(file, os.O_RDWR)):
        os.close(opened)
        return descriptor
    os.close(descriptor)
    with suppress(OSError):
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return opened


def _newest(folder: Path) -> tuple[int, Owner] | None:
    for attempt in range(_ATTEMPTS):
        numbers = _numbers(folder)
        if not numbers:
            return None
        file = folder / f".lock.{max(numbers)}"
        try:
            return max(numbers), Owner(**json.loads(file.read_bytes()))
        except FileNotFoundError:
            continue  # its successor is there now
        except (OSError, ValueError, TypeError) as error:
            if attempt + 1 < _ATTEMPTS:
                time.sleep(0.01)
                continue
            raise ConfigError(
                f"{file}: cannot be read ({error}), so whether a run is live there is not known; "
                "remove it if there is none"
            ) from error
    return None


def _numbers(folder: Path) -> list[int]:
    return [int(match[1]) for name in os.listdir(folder) if (match := _LOCK.fullmatch(name))]


def _why_alive(file: Path, owner: Owner, *, clock: Path | None = None) -> str | None:
    me = _this_process()
    if owner.released:
        return None
    if (owner.boot, owner.namespace) == (me.boot, me.namespace) and owner.boot:
        return owner.shown if _start_of(owner.pid) == owner.started else None
    if owner.boot == me.boot and owner.boot:
        return f"{owner.shown}, in another container" if _is_locked(file) else None
    silent = _seconds_silent(file, clock=clock)
    if silent > SILENT_SECONDS:
        return None
    return f"{owner.shown}, last heard of {max(0.0, silent):.0f} s ago; after {SILENT_SECONDS:.0f} s it counts as dead"


def _seconds_silent(file: Path, *, clock: Path | None) -> float:
    """By the disk's own clock: `clock` is a file that was written just now."""
    try:
        now = time.time() if clock is None else clock.stat().st_mtime
        return now - file.stat().st_mtime
    except OSError:
        return 0.0


def _is_locked(file: Path) -> bool:
    try:
        descriptor = os.open(file, os.O_RDWR)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def _this_process() -> Owner:
    return Owner(
        host=platform.node(),
        pid=os.getpid(),
        started=_start_of(os.getpid()) or "",
        boot=_text(Path("/proc/sys/kernel/random/boot_id")),
        namespace=_link_text(Path("/proc/self/ns/pid")),
        token=uuid.uuid4().hex,
    )


def _start_of(pid: int) -> str | None:
    """When the process began; None when there is none, or a dead one that nobody has waited for."""
    try:
        # The name of the program, in parentheses, may hold anything.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in ("Z", "X") else fields[19]


def _text(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""


def _link_text(file: Path) -> str:
    try:
        return os.readlink(file)
    except OSError:
        return ""
