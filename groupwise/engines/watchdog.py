"""Starts a command in a session of its own and ends it, with all that it started, when whoever started this is gone.

Run as a file by the trainer's interpreter, with nothing but the standard library. Its standard input is a pipe that the
trainer holds: the kernel closes it when the trainer ends, however that comes about. A line `kill` ends the command at
once; the end of the pipe ends it as Ctrl-C would, and after a while for good.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

GRACE_SECONDS = 10.0


def main() -> int:
    """`watchdog.py LOG JSON`, where JSON is a list of words."""
    log, command = Path(sys.argv[1]), json.loads(sys.argv[2])
    for told in (signal.SIGINT, signal.SIGHUP):  # by the trainer's terminal: the trainer decides
        signal.signal(told, _go_on)  # not ignored: the command would inherit that, and be deaf to Ctrl-C
    with log.open("ab") as out:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
    threading.Thread(target=_listen, args=(child,), daemon=True).start()
    code = child.wait()
    _end_session(child.pid)  # what it left behind
    return code if code >= 0 else 128 - code


def _go_on(number: int, frame: object) -> None:
    """It is for the trainer to say."""


def _listen(child: "subprocess.Popen[bytes]") -> None:
    if sys.stdin.readline().strip() != "kill":
        _signal_session(child.pid, signal.SIGINT)
        deadline = time.monotonic() + GRACE_SECONDS
        while time.monotonic() < deadline and child.poll() is None:
            time.sleep(0.05)
    _end_session(child.pid)


def _end_session(session: int) -> None:
    """Until none of its processes is left: one may start another while it is ended."""
    for _ in range(50):
        if not _signal_session(session, signal.SIGKILL):
            return
        time.sleep(0.05)


def _signal_session(session: int, number: int) -> int:
    """To every process of it; returns how many there were."""
    found = 0
    for entry in Path("/proc").iterdir() if Path("/proc").is_dir() else ():
        if entry.name.isdigit() and _session_of(entry) == session:
            found += 1
            try:
                os.kill(int(entry.name), number)
            except OSError:
                continue
    if not Path("/proc").is_dir():
        try:
            os.killpg(session, number)
        except OSError:
            return 0
    return found


def _session_of(entry: Path) -> "int | None":
    try:
        fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        return None
    return None if fields[0] == "Z" else int(fields[3])


if __name__ == "__main__":
    sys.exit(main())
