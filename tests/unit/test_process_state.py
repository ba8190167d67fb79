"""What user code changes of the process is as it was afterwards."""

from __future__ import annotations

import gc
import locale
import logging
import os
import resource
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from groupwise import process_state
from groupwise.process_state import guarded


@pytest.fixture(autouse=True)
def _warn_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_state._guards, "warned", set())


def _silence() -> None:
    logging.disable(logging.CRITICAL)
    logging.getLogger("groupwise").disabled = True
    logging.getLogger("groupwise.rewards").setLevel(logging.CRITICAL)
    logging.getLogger("groupwise").handlers.clear()


def _lower_limit() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (20, hard))


def _umask_now() -> int:
    found = os.umask(0o022)
    os.umask(found)
    return found


def _logging_now() -> Any:
    ours = logging.getLogger("groupwise")
    child = logging.getLogger("groupwise.rewards")
    return logging.root.manager.disable, ours.disabled, list(ours.handlers), child.level


CHANGES: list[tuple[str, Callable[[], Any], Callable[[], Any]]] = [
    ("working directory", lambda: os.chdir("/"), os.getcwd),
    ("environment variables", lambda: os.environ.pop("PATH"), lambda: os.environ["PATH"]),
    ("environment variables", os.environ.clear, lambda: os.environ["HOME"]),
    ("umask", lambda: os.umask(0o777), _umask_now),
    ("logging", _silence, _logging_now),
    ("standard output", lambda: setattr(sys, "stdout", None), lambda: sys.stdout),
    (
        "warnings as errors",
        lambda: warnings.simplefilter("error"),
        lambda: [f for f in warnings.filters if f[0] == "error"],
    ),
    ("signal handlers", lambda: signal.signal(signal.SIGINT, signal.SIG_IGN), lambda: signal.getsignal(signal.SIGINT)),
    ("resource limits", _lower_limit, lambda: resource.getrlimit(resource.RLIMIT_NOFILE)),
    ("torch's defaults", lambda: torch.set_default_dtype(torch.float64), torch.get_default_dtype),
    ("torch's defaults", lambda: torch.set_float32_matmul_precision("medium"), torch.get_float32_matmul_precision),
    ("torch's defaults", lambda: torch.use_deterministic_algorithms(True), torch.are_deterministic_algorithms_enabled),
    ("locale", lambda: locale.setlocale(locale.LC_ALL, "C.UTF-8"), lambda: locale.setlocale(locale.LC_ALL)),
    ("recursion limit", lambda: sys.setrecursionlimit(200), sys.getrecursionlimit),
    ("garbage collection", gc.disable, gc.isenabled),
    ("switch interval", lambda: sys.setswitchinterval(1.0), sys.getswitchinterval),
    ("torch's state in this thread", lambda: torch.set_grad_enabled(False), torch.is_grad_enabled),
    ("torch's state in this thread", lambda: torch.set_default_device("meta"), torch.get_default_device),
    ("torch's state in this thread", lambda: torch.set_num_threads(3), torch.get_num_threads),
    ("numpy's errors", lambda: np.seterr(all="raise"), np.geterr),
]


@pytest.mark.parametrize(
    ("name", "change", "read"), CHANGES, ids=[f"{i}-{name}" for i, (name, _, _) in enumerate(CHANGES)]
)
def test_a_change_is_set_back_and_said_once(
    name: str, change: Callable[[], Any], read: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(process_state.logger, "warning", lambda text, *parts: said.append(text % parts))
    handler = logging.NullHandler()
    logging.getLogger("groupwise").addHandler(handler)
    own_locale = locale.setlocale(locale.LC_ALL)
    locale.setlocale(locale.LC_ALL, "C")
    monkeypatch.setenv("HOME", "/somewhere")
    before = read()
    try:
        for _ in range(2):
            with guarded("reward 'mine'", this_thread=True):
                change()
                assert name == "environment variables" or read() != before
            assert read() == before
    finally:
        logging.getLogger("groupwise").removeHandler(handler)
        locale.setlocale(locale.LC_ALL, own_locale)
    assert said == [f"reward 'mine' changed what the whole process shares: {name}; it is set back after each call"]


def test_what_harms_nobody_stays() -> None:
    limit = sys.getrecursionlimit()
    try:
        with guarded("a reward"):
            os.environ["GROUPWISE_TEST_NEW"] = "1"
            sys.setrecursionlimit(limit + 1000)
            warnings.filterwarnings("ignore", message="never seen")
        assert os.environ["GROUPWISE_TEST_NEW"] == "1"
        assert sys.getrecursionlimit() == limit + 1000
        assert any(entry[1] is not None and entry[1].pattern == "never seen" for entry in warnings.filters)
    finally:
        os.environ.pop("GROUPWISE_TEST_NEW", None)
        sys.setrecursionlimit(limit)


def test_one_call_may_need_its_change_until_it_ends(tmp_path: Path) -> None:
    home, inside, done = os.getcwd(), threading.Event(), threading.Event()

    def other() -> None:
        with guarded("another reward"):
            inside.set()
            done.wait(10)

    thread = threading.Thread(target=other)
    thread.start()
    inside.wait(10)
    with guarded("a reward"):
        os.chdir(tmp_path)
    assert Path.cwd() == tmp_path  # the other one may have changed it, and still runs
    done.set()
    thread.join()
    assert os.getcwd() == home


def test_a_closed_standard_output_is_opened_again(tmp_path: Path) -> None:
    code = """
import sys
from groupwise.process_state import guarded
with guarded("a reward"):
    sys.stdout.close()
print("still here")
open("file.txt", "w").write("mine")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "still here\n"), done.stderr
    assert (tmp_path / "file.txt").read_text() == "mine"


def test_a_removed_working_directory_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    with guarded("a reward"):
        gone.rmdir()
        os.chdir(tmp_path)
    with guarded("a reward"):
        pass
