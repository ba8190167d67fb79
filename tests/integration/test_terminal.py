"""What a run leaves on a terminal of 40, 80 and 200 columns, with NO_COLOR, and in a pipe."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len

RUN = ("--eval.every", "2", "--train.steps", "4", "--tracking.backends", "console")
OLD = ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "CLICOLOR_FORCE", "TTY_COMPATIBLE")


def environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in OLD}
    return {**kept, "OMP_NUM_THREADS": "1", "TERM": "xterm-256color", **more}


def on_terminal(columns: int, *arguments: str, **more: str) -> str:
    """Everything that `groupwise ARGUMENTS` writes to a terminal of so many columns."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    command = [sys.executable, "-m", "groupwise.cli", *arguments]
    process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=environment(**more))
    os.close(slave)
    written = b""
    while True:
        try:
            part = os.read(master, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        written += part
    os.close(master)
    assert process.wait(60) == 0, written.decode(errors="replace")
    return written.decode()


def screen(written: str) -> list[str]:
    """The lines that stand there at the end: what a terminal makes of returns, erasures and moves upward."""
    lines, row = [""], 0
    for token in re.findall(r"\x1b\[[0-9?;]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", written):
        if token == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif token == "\x1b[2K":
            lines[row] = ""
        elif re.fullmatch(r"\x1b\[\d*A", token):
            row -= int(token[2:-1] or 1)
        elif token not in ("\r",) and token[0] != "\x1b":
            lines[row] += token
    return [line.rstrip() for line in lines]


def flags(task: Any, run: Path) -> list[str]:
    run.parent.mkdir(exist_ok=True)
    other = Path("other.py")
    other.write_text("def first(completion_ids, **columns):\n    return [ids[0] / 259 for ids in completion_ids]\n")
    rewards = ["--reward", task.reward("low"), "--reward", f"{other}:first"]
    given = [flag for flag in task.flags(run) if flag not in ("--reward", task.reward("low"))]
    return [*given, *rewards, "--eval-data", str(task.rows), "--eval.limit", "2", *RUN]


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """So that runs have short names, as a user gives them."""
    monkeypatch.chdir(tmp_path)
    return Path("runs")


@pytest.mark.parametrize(
    ("columns", "fourth"),
    [
        (40, r"step 4/4  reward \d\.\d{3}  accuracy [\d.]+%"),
        (80, r"step 4/4  reward \d\.\d{3}  low accuracy [\d.]+%  equal \d+%  cut \d+%  loss -?\d\.\d{4}"),
        (
            200,
            r"step 4/4  reward -?\d+\.\d{3}  low \d\.\d{3}  first \d+\.\d{3}  low accuracy [\d.]+%  equal \d+%  "
            r"cut \d+%  loss -?[\d.]+  length \d+  tok/s \d+  seconds [\d.]+",
        ),
    ],
)
def test_lines_fit_the_terminal(task: Any, own_folder: Path, columns: int, fourth: str) -> None:
    lines = screen(on_terminal(columns, "train", *flags(task, own_folder / "one")))
    steps = [line for line in lines if line.startswith("step")]
    assert [line.split()[1] for line in steps] == ["0/4", "1/4", "2/4", "3/4", "4/4"]
    assert re.fullmatch(fourth, steps[-1]), steps[-1]
    assert max(map(cell_len, steps)) <= columns
    [bar] = [index for index, line in enumerate(lines) if "4/4" in line and "━" in line]
    assert bar > lines.index(steps[-1]), "below the lines"
    assert cell_len(lines[bar]) <= columns
    end = lines[next(index for index, line in enumerate(lines) if line.startswith("done")) :]
    assert re.fullmatch(r"done: 4 steps in \d+ s", end[0])
    assert end[1] == "accuracy (low), 95 % interval:"
    assert re.fullmatch(r"  before +[\d.]+%  [\d.]+% to [\d.]+%", end[2])
    assert re.fullmatch(r"  after  +[\d.]+%  [\d.]+% to [\d.]+%", end[3])
    assert "findings: " in end[4]
    assert end[-4:] == [
        "model: runs/one/final",
        "next:  groupwise chat runs/one",
        "next:  groupwise report runs/one --open",
        "",
    ]
    assert max(map(cell_len, end)) <= columns


@pytest.mark.slow
def test_no_color_has_no_color(task: Any, own_folder: Path) -> None:
    arguments = ("train", *flags(task, own_folder / "one"), "--tracking.samples_every", "4")
    colors = r"\x1b\[[0-9;]*?\b(?:3[0-8]|4[0-8]|9[0-7]|10[0-7])\b[0-9;]*m"
    assert not re.search(colors, on_terminal(80, *arguments, NO_COLOR="1"))
    assert re.search(colors, on_terminal(80, *arguments, "--overwrite"))


def test_a_pipe_gets_whole_lines_and_nothing_that_acts(task: Any, own_folder: Path) -> None:
    command = [sys.executable, "-m", "groupwise.cli", "train", *flags(task, own_folder / "one")]
    done = subprocess.run(command, capture_output=True, timeout=100, env=environment(), check=True)
    assert b"\x1b" not in done.stdout + done.stderr
    steps = [line for line in done.stderr.decode().splitlines() if line.startswith("step")]
    assert len(steps) == 5
    assert all("  seconds " in line and "  tok/s " in line for line in steps[1:])
    assert done.stdout.decode().splitlines()[0].startswith("done: 4 steps")


@pytest.mark.slow
def test_supervised_lines_are_thinned_and_the_last_is_there(task: Any, own_folder: Path) -> None:
    given = [str(task.worked) if flag == str(task.rows) else flag for flag in task.supervised_flags(own_folder / "sft")]
    arguments = [*given, "--train.steps", "150", "--tracking.backends", "console"]
    command = [sys.executable, "-m", "groupwise.cli", "sft", *arguments]
    done = subprocess.run(command, capture_output=True, timeout=100, env=environment(), check=True)
    steps = [line.split()[1] for line in done.stderr.decode().splitlines() if line.startswith("step")]
    assert (steps[0], steps[-1]) == ("1/150", "150/150")
    assert len(steps) < 12
    last = done.stdout.decode().splitlines()
    assert re.fullmatch(r"loss of the last step: \d+\.\d{4}", last[1])
    assert last[-2:] == ["next:  groupwise chat runs/sft", "next:  groupwise report runs/sft --open"]


def test_a_stopped_run_says_what_was_found_and_ends_as_failed(task: Any, own_folder: Path) -> None:
    arguments = [*flags(task, own_folder / "one"), "--rollout.max_completion_tokens", "2", "--eval.every", "0"]
    command = [sys.executable, "-m", "groupwise.cli", "train", *arguments, "--train.stop_on", "answers_cut"]
    done = subprocess.run(command, capture_output=True, timeout=100, env=environment(), check=False)
    assert done.returncode == 1
    assert b"done:" not in done.stdout
    assert b"error: stopped after step 3, as train.stop_on asks: answers_cut" in done.stderr
