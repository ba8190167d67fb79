"""One command in a process of its own, forked from one that has loaded everything: milliseconds, and nothing stays."""

from __future__ import annotations

import math
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from cases import Case

WAITS = 6  # deadlines of the clock, for a command that sleeps
MEMORY = 8 * 2**30  # bytes of address space beyond what is loaded


@dataclass(frozen=True)
class Outcome:
    """What a command did; `code` is None where it was killed at the deadline."""

    code: int | None
    signal: int
    seconds: float
    output: str
    errors: str

    def faults(self, case: Case) -> list[str]:
        """What is wrong with it; nothing is expected to be."""
        found: list[str] = []
        if self.code is None:
            return [f"no end after {self.seconds:.0f} s"]
        if self.signal:
            found.append(f"killed by signal {self.signal}")
        if self.code not in case.codes:
            found.append(f"exit code {self.code}, expected one of {sorted(case.codes)}")
        for text in (
            "Traceback (most recent call last)",
            "This was not foreseen",
            "Do you wish to run the custom code",
        ):
            if text in self.output + self.errors:
                found.append(f"printed {text!r}")  # noqa: PERF401
        if "\x1b" in self.errors:
            found.append("an escape sequence reached the terminal")
        if self.code and not self.signal and not self.errors.strip():
            found.append("failed without a word")
        return found


def run_case(case: Case, world: Path, *, deadline: float) -> Outcome:
    """Run it in a fresh folder, which is gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    try:
        place = folder / "work"
        place.mkdir()
        case.lay_out(world, place)
        return _fork(case, place, folder, deadline=deadline)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _fork(case: Case, place: Path, folder: Path, *, deadline: float) -> Outcome:
    out, err = folder / "out", folder / "err"
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        _be_the_command(case, place, out, err, deadline=deadline)
    status = _wait(child, started + WAITS * deadline)
    seconds = time.monotonic() - started
    texts = [file.read_text("utf-8", errors="backslashreplace") if file.exists() else "" for file in (out, err)]
    if status is None or (os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL)):
        return Outcome(None, 0, seconds, *texts)
    killed = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    return Outcome(os.waitstatus_to_exitcode(status), killed, seconds, *texts)


def _wait(child: int, until: float) -> int | None:
    pause = 0.002
    while time.monotonic() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        time.sleep(pause)
        pause = min(0.05, pause * 1.5)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def _be_the_command(case: Case, place: Path, out: Path, err: Path, *, deadline: float) -> None:
    code = 99
    try:
        os.setpgid(0, 0)
        os.chdir(place)
        for target, file in ((1, out), (2, err)):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), target)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
        sys.stdout = open(1, "w", encoding="utf-8", errors="surrogateescape", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        # Its own seconds: on a busy machine those of the clock say nothing.
        resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(deadline), math.ceil(deadline)))
        from groupwise.cli import main

        try:
            code = main(case.argv)
        except SystemExit as ended:
            code = int(ended.code or 0)
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
        code = 98
    finally:
        os._exit(code)
