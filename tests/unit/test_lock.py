from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from groupwise import lock as locks
from groupwise.errors import CheckpointError, ConfigError
from groupwise.lock import Owner, hold, holder

RACE = """
import sys, time
from pathlib import Path
from groupwise.errors import ConfigError
from groupwise.lock import hold
folder, start = Path(sys.argv[1]), Path(sys.argv[2])
while not start.exists():
    pass
try:
    with hold(folder):
        print("won", flush=True)
        sys.stdin.read()
except ConfigError as error:
    print("refused" if "live run" in str(error) else error, flush=True)
"""


def leave(folder: Path, owner: Owner, number: int = 1) -> Path:
    """What an owner that is gone leaves."""
    folder.mkdir(exist_ok=True)
    file = folder / f".lock.{number}"
    file.write_text(json.dumps(asdict(owner)))
    return file


@pytest.fixture
def me(tmp_path: Path) -> Iterator[Owner]:
    with hold(tmp_path / "other") as lock:
        yield lock.owner


def test_a_live_owner_is_named_and_its_end_frees_the_folder(tmp_path: Path):
    run = tmp_path / "a" / "run"
    with hold(run) as lock:
        (run / "log.txt").write_text("x")
        assert f"process {os.getpid()} on " in (holder(run) or "")
        lock.confirm()
        with pytest.raises(ConfigError, match=f"process {os.getpid()} on "), hold(run):
            pass
    assert holder(run) is None
    with hold(run) as lock:
        assert lock.number == 2


def test_a_folder_that_was_made_for_nothing_goes(tmp_path: Path):
    with pytest.raises(ValueError, match="no model"), hold(tmp_path / "runs" / "one"):
        raise ValueError("no model")
    assert not (tmp_path / "runs").exists()


def test_a_killed_owner_s_folder_is_taken_over(tmp_path: Path):
    code = "import sys, os, signal; from pathlib import Path; from groupwise.lock import hold\n"
    code += "with hold(Path(sys.argv[1])): os.kill(os.getpid(), signal.SIGKILL)"
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")], check=False).returncode == -9
    assert holder(tmp_path / "run") is None
    with hold(tmp_path / "run") as lock:
        assert lock.number == 2


def test_another_process_with_the_dead_one_s_pid_is_not_its_owner(tmp_path: Path, me: Owner):
    leave(tmp_path / "run", replace(me, started="1"))
    assert holder(tmp_path / "run") is None
    leave(tmp_path / "run", me)
    assert holder(tmp_path / "run") is not None


def test_an_owner_on_another_machine_lives_while_it_is_heard_of(tmp_path: Path, me: Owner):
    file = leave(tmp_path / "run", replace(me, host="node7", boot="another", pid=1))
    with pytest.raises(ConfigError, match=r"process 1 on node7, last heard of \d+ s ago; after 180 s"):
        hold(tmp_path / "run").__enter__()
    silent = time.time() - locks.SILENT_SECONDS - 1
    os.utime(file, (silent, silent))
    with hold(tmp_path / "run") as lock:
        assert lock.number == 2


def test_an_owner_in_another_container_lives_while_it_holds_the_kernel_s_lock(tmp_path: Path, me: Owner):
    import fcntl

    file = leave(tmp_path / "run", replace(me, namespace="pid:[1]"))
    with file.open("r+") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        assert "in another container" in (holder(tmp_path / "run") or "")
    assert holder(tmp_path / "run") is None


def test_a_live_owner_renews_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(locks, "HEARTBEAT_SECONDS", 0.02)
    with hold(tmp_path / "run") as lock:
        os.utime(lock.file, (1, 1))
        deadline = time.monotonic() + 10
        while lock.file.stat().st_mtime < 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_an_owner_that_was_taken_for_dead_writes_nothing_more(tmp_path: Path):
    with hold(tmp_path / "run") as lock:
        lock.confirm()
        leave(tmp_path / "run", replace(lock.owner, token="another", pid=99, host="node8"), number=2)
        with pytest.raises(CheckpointError, match="process 99 on node8 does"):
            lock.confirm()


def test_a_disk_without_links(tmp_path: Path, me: Owner, monkeypatch: pytest.MonkeyPatch):
    def refuse(source: Path, target: Path) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    leave(tmp_path / "run", replace(me, started="1"))
    with hold(tmp_path / "run") as lock:
        assert lock.number == 2
        assert locks._is_locked(lock.file)
        with pytest.raises(ConfigError, match="a live run"), hold(tmp_path / "run"):
            pass
    assert holder(tmp_path / "run") is None


def test_a_lock_that_cannot_be_read_is_named(tmp_path: Path):
    (tmp_path / ".lock.3").write_text("{")
    with pytest.raises(ConfigError, match=r"\.lock\.3: cannot be read"):
        holder(tmp_path)


@pytest.mark.parametrize("before", ["nothing", "a dead owner"])
def test_of_many_that_start_at_one_instant_one_wins(tmp_path: Path, me: Owner, before: str):
    run, start = tmp_path / "run", tmp_path / "start"
    if before == "a dead owner":
        leave(run, replace(me, started="1"), number=4)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    racers = [subprocess.Popen([sys.executable, "-c", RACE, str(run), str(start)], **pipes) for _ in range(4)]
    time.sleep(0.5)
    start.touch()
    said = [racer.stdout.readline().strip() for racer in racers if racer.stdout]
    assert sorted(said) == ["refused", "refused", "refused", "won"]
    for racer in racers:
        racer.communicate()
