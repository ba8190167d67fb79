"""What people see of warnings, each time in a process of its own, to which `logging` and `warnings` belong."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

START = """
import io, logging, sys, warnings
from pathlib import Path
import groupwise
from groupwise.notices import logged_to, once_each
log = logging.getLogger("groupwise.some.part")
"""


def shown(code: str, *flags: str) -> list[str]:
    """Lines on standard error."""
    done = subprocess.run([sys.executable, *flags, "-c", START + code], capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stderr.decode().splitlines()


def test_a_warning_is_seen_in_every_program() -> None:
    assert shown('log.warning("one %d", 1); log.info("fine"); log.error("two")') == ["warning: one 1", "error: two"]


def test_the_same_text_is_shown_once_and_counted() -> None:
    code = """
with once_each():
    for _ in range(38):
        log.warning("the same")
    log.warning("seldom"); log.warning("seldom"); log.warning("never again")
log.warning("the same")
"""
    assert shown(code) == [
        "warning: the same",
        "warning: seldom",
        "warning: never again",
        "(… 37 more times: warning: the same)",
        "(… 1 more time: warning: seldom)",
        "warning: the same",
    ]


def test_texts_that_differ_in_a_number_do_not_flood() -> None:
    lines = shown('with once_each():\n  for step in range(1000): log.warning("step %d is bad", step)')
    assert lines == [
        *(f"warning: step {step} is bad" for step in range(10)),
        "(… 990 more of the kind: warning: step 0 is bad)",
    ]


def test_a_run_in_a_command_counts_with_the_command() -> None:
    code = """
with once_each():
    log.warning("a")
    with logged_to(Path("/dev/null")):
        log.warning("a")
    log.warning("a")
"""
    assert shown(code) == ["warning: a", "(… 2 more times: warning: a)"]


def test_python_s_own_warnings_are_shown_and_logged(tmp_path: Path) -> None:
    file = tmp_path / "log.txt"
    code = f"""
before = warnings.showwarning
with logged_to(Path({str(file)!r})):
    for k in range(1000):
        warnings.simplefilter("always")
        warnings.warn("old \\x1b[2J and tired")
assert warnings.showwarning is before
warnings.warn("as Python does")
"""
    lines = shown(code)
    assert lines[0] == "warning: UserWarning: old \\x1b[2J and tired (<string>:12)"
    assert lines[1] == "(… 999 more times: warning: UserWarning: old \\x1b[2J and tired (<string>:12))"
    assert lines[2].endswith("UserWarning: as Python does")
    assert len(lines) == 3
    assert file.read_text().count("WARNING py.warnings: UserWarning: old \\x1b[2J") == 1000


def test_a_program_that_collects_python_s_warnings_gets_them() -> None:
    code = """
with warnings.catch_warnings(record=True) as found, once_each():
    warnings.simplefilter("always")
    warnings.warn("for the program")
assert [str(each.message) for each in found] == ["for the program"]
"""
    assert shown(code) == []


@pytest.mark.parametrize(
    "setting",
    [
        'logging.basicConfig(format="own %(message)s")',
        'h = logging.StreamHandler(); h.setFormatter(logging.Formatter("own %(message)s"))\n'
        'logging.getLogger("groupwise").addHandler(h)',
        "import rich.logging, rich.console\n"
        'logging.basicConfig(format="own %(message)s", handlers=[rich.logging.RichHandler(show_time=False, '
        "show_level=False, show_path=False, console=rich.console.Console(stderr=True, width=80))])",
    ],
    ids=["basicConfig", "its own handler", "rich"],
)
def test_a_program_that_shows_its_log_is_not_told_twice(setting: str) -> None:
    lines = shown(f'{setting}\nwith logged_to(Path("/dev/null")):\n  log.warning("x")')
    assert [line.strip() for line in lines] in (["own x"], ["x"])


def test_a_file_of_the_program_is_no_terminal(tmp_path: Path) -> None:
    code = f'logging.basicConfig(filename={str(tmp_path / "own.log")!r})\nlog.warning("x")'
    assert shown(code) == ["warning: x"]


def test_what_the_program_silenced_stays_silent(tmp_path: Path) -> None:
    code = f"""
logging.getLogger("groupwise").setLevel("ERROR")
with logged_to(Path({str(tmp_path / "log.txt")!r})):
    log.warning("quiet"); log.error("loud")
"""
    assert shown(code) == ["error: loud"]
    assert "quiet" in (tmp_path / "log.txt").read_text()


def test_hostile_texts_act_nowhere(tmp_path: Path) -> None:
    file = tmp_path / "log.txt"
    code = f"""
with logged_to(Path({str(file)!r})):
    log.warning("%s", "\\x1b[2J\\x00\\udcff\\n2026-01-01 ERROR forged: line " + "x" * 10_000_000)
"""
    lines = shown(code)
    assert lines[0] == "warning: \\x1b[2J\\x00\\udcff"
    assert sum(map(len, lines)) < 5_000
    text = file.read_text(encoding="utf-8")
    assert len(text) < 25_000
    assert "\n  2026-01-01 ERROR forged" in text
    assert "\x1b" not in text


def test_a_traceback_is_for_the_log(tmp_path: Path) -> None:
    file = tmp_path / "log.txt"
    code = f"""
with logged_to(Path({str(file)!r})):
    log.warning("failed\\nTraceback (most recent call last):\\n  File x")
"""
    assert shown(code) == ["warning: failed"]
    assert "File x" in file.read_text()


def test_a_terminal_that_is_gone_ends_nothing() -> None:
    assert shown('sys.stderr.close()\nwith once_each():\n  log.warning("x"); log.warning("x")') == []


def test_a_bar_is_printed_around_not_through(tmp_path: Path) -> None:
    """On a terminal: the warning stands on lines of its own above the bar, once."""
    code = (
        START
        + f"""
import time
from groupwise.tracking.console import ConsoleTracker
with logged_to(Path({str(tmp_path / "log.txt")!r})):
    bar = ConsoleTracker(title="t", total_steps=3)
    bar.start({{}}, Path("run"))
    for step in (1, 2, 3):
        log.warning("a warning of the run that is longer than the terminal is wide, so that it has to be broken up")
        warnings.warn("python's")
        bar.log(step, {{"reward": 0.5}})
        time.sleep(0.15)
    bar.close()
"""
    )
    master, slave = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "60"}
    process = subprocess.Popen([sys.executable, "-c", code], stdout=slave, stderr=slave, env=environment)
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
    assert process.wait(60) == 0
    lines = screen(written.decode())
    whole = "warning: a warning of the run that is longer than the terminal is wide, so that it has to be broken up"
    assert [line for line in lines if line.startswith("warning: a warning")] == [whole]
    assert sum("UserWarning: python's" in line for line in lines) == 1
    assert [line for line in lines if line.startswith("step")] == [f"step {k}/3  reward 0.500" for k in (1, 2, 3)]
    assert sum("/3" in line and not line.startswith("step") for line in lines) == 1, "one bar"
    assert "(… 2 more times: warning: a warning" in "\n".join(lines)


def screen(written: str) -> list[str]:
    """The lines that stand there at the end: what a terminal makes of returns, erasures and moves upward."""
    lines, row = [""], 0
    for token in re.findall(r"\x1b\[[0-9?]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", written):
        if token == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif token == "\r":
            pass
        elif token == "\x1b[2K":
            lines[row] = ""
        elif re.fullmatch(r"\x1b\[\d*A", token):
            row -= int(token[2:-1] or 1)
        elif token[0] != "\x1b":
            lines[row] += token
    return [line.rstrip() for line in lines]
