"""What belongs to the whole process, kept as it was while code of the user's runs in it.

A reward or a callback may change the working directory, torch's default type, the logging, … for itself; all of that is
shared with the trainer. `guarded` reads it before such code runs and sets it back afterwards. Code of several users may
run at one time, in threads: then it is set back when the last of them is done, since one may need what it changed until
it ends. New environment variables stay, since a library may count on its own; those that were there keep their values.

A boundary module: each setting is read and written through functions that may fail, and none of them may end the run.
"""

from __future__ import annotations

import gc
import locale
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

logger = logging.getLogger(__name__)

_LIMITS = ("RLIMIT_AS", "RLIMIT_CPU", "RLIMIT_DATA", "RLIMIT_FSIZE", "RLIMIT_NOFILE", "RLIMIT_STACK")
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True, slots=True)
class Setting:
    """One thing that the process has once.

    Attributes:
        name: for the warning.
        read: its value now; equal values are the same setting. None: it is not there (yet), and is left alone.
        restore: sets a value that `read` gave.

    Example:
        Setting("recursion limit", sys.getrecursionlimit, sys.setrecursionlimit)
    """

    name: str
    read: Callable[[], Any]
    restore: Callable[[Any], object]


def _directory() -> str | None:
    try:
        return os.getcwd()
    except OSError:  # it was removed
        return None


def _restore_environment(before: dict[str, str]) -> None:
    for name, value in before.items():
        if os.environ.get(name) != value:
            os.environ[name] = value


class _Environment(dict[str, str]):
    """Equal to a later one that has all of it."""

    def __eq__(self, later: object) -> bool:
        return isinstance(later, dict) and self.items() <= later.items()

    __hash__ = None  # type: ignore[assignment]


def _logging() -> tuple[Any, ...]:
    """Of our own loggers: what could silence them."""
    own = [logging.getLogger("groupwise")]
    known = sorted(logging.root.manager.loggerDict.items(), key=lambda item: item[0])
    own += [found for name, found in known if name.startswith("groupwise.") and isinstance(found, logging.Logger)]
    return logging.root.manager.disable, tuple(
        (found, found.level, found.disabled, found.propagate, tuple(found.handlers), tuple(found.filters))
        for found in own
    )


def _restore_logging(before: tuple[Any, ...]) -> None:
    disabled_below, loggers = before
    logging.disable(disabled_below)
    for found, level, disabled, propagate, handlers, filters in loggers:
        found.setLevel(level)
        found.disabled, found.propagate = disabled, propagate
        found.handlers[:], found.filters[:] = handlers, filters


def _streams() -> tuple[Any, ...]:
    return tuple((name, stream, _is_closed(stream)) for name in _kept for stream in [getattr(sys, name)])


def _is_closed(stream: Any) -> bool:
    try:
        return bool(stream.closed)
    except (AttributeError, ValueError):
        return False


def _restore_streams(before: tuple[Any, ...]) -> None:
    for name, stream, was_closed in before:
        kept = _kept[name]
        if _is_closed(stream) and not was_closed and kept is not None:
            number = 1 if name == "stdout" else 2
            try:
                os.fstat(number)
            except OSError:  # it went with the stream; a file opened next would get its number
                os.dup2(kept, number)
            stream = open(os.dup(kept), "w", encoding="utf-8", errors="backslashreplace", buffering=1)  # noqa: SIM115
        setattr(sys, name, stream)


def _raising_filters() -> tuple[Any, ...]:
    """Filters that make an exception of a warning, which would then end the run; others only change what is shown."""
    return tuple(entry for entry in warnings.filters if entry[0] == "error")


def _restore_filters(before: tuple[Any, ...]) -> None:
    warnings.filters[:] = [entry for entry in warnings.filters if entry[0] != "error" or entry in before]  # type: ignore[index]
    warnings.filterwarnings("default", message="(?!)")  # matches nothing; makes the change known
    del warnings.filters[0]  # type: ignore[attr-defined]


def _handlers() -> tuple[Any, ...] | None:
    if threading.current_thread() is not threading.main_thread():
        return None
    return tuple(signal.getsignal(number) for number in _SIGNALS)


def _restore_handlers(before: tuple[Any, ...]) -> None:
    for number, handler in zip(_SIGNALS, before, strict=True):
        if handler is not None:  # one that was not set by Python cannot be
            signal.signal(number, handler)


def _limits() -> tuple[tuple[int, int], ...] | None:
    try:
        import resource
    except ImportError:
        return None
    known = [getattr(resource, name) for name in _LIMITS if hasattr(resource, name)]
    return tuple((number, resource.getrlimit(number)[0]) for number in known)


def _restore_limits(before: tuple[tuple[int, int], ...]) -> None:
    import resource

    for number, soft in before:
        hard = resource.getrlimit(number)[1]
        if resource.getrlimit(number)[0] != soft:
            with suppress(ValueError, OSError):  # a hard limit that was lowered too cannot be raised again
                resource.setrlimit(number, (soft, hard))


def _torch() -> tuple[Any, ...] | None:
    torch = sys.modules.get("torch")
    if torch is None or not hasattr(torch, "get_default_dtype"):
        return None
    return (
        torch.get_default_dtype(),
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
    )


def _restore_torch(before: tuple[Any, ...]) -> None:
    torch = sys.modules["torch"]
    torch.set_default_dtype(before[0])
    torch.set_float32_matmul_precision(before[1])
    if torch.are_deterministic_algorithms_enabled() != before[2]:
        torch.use_deterministic_algorithms(before[2])


def _torch_here() -> tuple[Any, ...] | None:
    torch = sys.modules.get("torch")
    if torch is None or not hasattr(torch, "get_default_device"):
        return None
    return torch.is_grad_enabled(), torch.get_num_threads(), torch.get_default_device()


def _restore_torch_here(before: tuple[Any, ...]) -> None:
    torch = sys.modules["torch"]
    torch.set_grad_enabled(before[0])
    if torch.get_num_threads() != before[1]:
        torch.set_num_threads(before[1])
    if torch.get_default_device() != before[2]:
        torch.set_default_device(None if before[2].type == "cpu" else before[2])


def _numpy_here() -> dict[str, Any] | None:
    numpy = sys.modules.get("numpy")
    return numpy.geterr() if numpy is not None and hasattr(numpy, "geterr") else None


def _set_gc(enabled: bool) -> None:
    (gc.enable if enabled else gc.disable)()


class _AtLeast(int):
    """A number, equal to every larger one."""

    def __eq__(self, later: object) -> bool:
        return isinstance(later, int) and int(later) >= int(self)

    __hash__ = int.__hash__


_SHARED = (
    Setting("working directory", _directory, os.chdir),
    Setting("environment variables", lambda: _Environment(os.environ), _restore_environment),
    Setting("logging", _logging, _restore_logging),
    Setting("standard output", _streams, _restore_streams),
    Setting("warnings as errors", _raising_filters, _restore_filters),
    Setting("signal handlers", _handlers, _restore_handlers),
    Setting("resource limits", _limits, _restore_limits),
    Setting("torch's defaults", _torch, _restore_torch),
    Setting("locale", lambda: locale.setlocale(locale.LC_ALL), lambda before: locale.setlocale(locale.LC_ALL, before)),
    Setting("recursion limit", lambda: _AtLeast(sys.getrecursionlimit()), lambda n: sys.setrecursionlimit(int(n))),
    Setting("garbage collection", gc.isenabled, _set_gc),
    Setting("switch interval", sys.getswitchinterval, sys.setswitchinterval),
)
_OF_THIS_THREAD = (
    Setting("torch's state in this thread", _torch_here, _restore_torch_here),
    Setting("numpy's errors", _numpy_here, lambda before: sys.modules["numpy"].seterr(**before)),
)


@dataclass(slots=True)
class _Guards:
    """Who runs now, and what was there before the first of them began."""

    running: list[str] = field(default_factory=list)
    before: list[Any] = field(default_factory=list)
    names: set[str] = field(default_factory=set)
    warned: set[str] = field(default_factory=set)


_guards = _Guards()
_lock = threading.RLock()
_kept: dict[str, int | None] = {}
_umask: int | None = None


@contextmanager
def guarded(who: str, *, this_thread: bool = False) -> Iterator[None]:
    """Within it, code of the user's runs, here or in a thread.

    Args:
        who: for the warning about what it changed.
        this_thread: it runs in this very thread, and so may change what belongs to that.
    """
    here = [setting.read() for setting in _OF_THIS_THREAD] if this_thread else []
    _enter(who)
    try:
        yield
    finally:
        changed = _set_back(_OF_THIS_THREAD, here) if this_thread else []
        _leave(who, changed)


def _enter(who: str) -> None:
    with _lock:
        if not _guards.running:
            _keep()
            _guards.before = [setting.read() for setting in _SHARED]
        _guards.running.append(who)
        _guards.names.add(who)


def _leave(who: str, changed: list[str]) -> None:
    with _lock:
        _guards.running.remove(who)
        if not _guards.running:
            assert _umask is not None, "it is read before anything runs"
            changed += _set_back(_SHARED, _guards.before)
            if os.umask(_umask) != _umask:
                changed.append("umask")
            names, _guards.names = ", ".join(sorted(_guards.names)), set()
            new = [name for name in changed if name not in _guards.warned]
            _guards.warned.update(new)
            if new:
                logger.warning(
                    "%s changed what the whole process shares: %s; it is set back after each call",
                    names,
                    ", ".join(new),
                )


def _keep() -> None:
    """Once, before anything of the user's runs: what cannot be read without a risk, or not any more."""
    global _umask
    if _umask is None:
        _umask = os.umask(0o077)
        os.umask(_umask)
    if not _kept:
        for name, number in (("stdout", 1), ("stderr", 2)):
            try:
                _kept[name] = os.dup(number)
            except OSError:
                _kept[name] = None


def _set_back(settings: tuple[Setting, ...], before: list[Any]) -> list[str]:
    """The names of those that had changed."""
    changed: list[str] = []
    for setting, value in zip(settings, before, strict=True):
        if value is None or value == setting.read():
            continue
        changed.append(setting.name)
        try:
            setting.restore(value)
        except Exception as error:  # noqa: BLE001 - a setting that cannot be set back must not end the run
            logger.warning("%s cannot be set back: %s: %s", setting.name, type(error).__name__, error)
    return changed
