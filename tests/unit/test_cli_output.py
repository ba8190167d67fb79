"""What commands print of texts by others, and what they take."""

from __future__ import annotations

import io
import os
import subprocess
import sys

import pytest

from groupwise.cli import app
from groupwise.cli.output import say, tell
from groupwise.cli.parsing import Command

HOSTILE = "gone\x1b[2J\x00\udcff\n\tend"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_nothing_that_acts_and_a_pipe_the_text_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    for stream, expected in ((Terminal(), r"gone\x1b[2J\x00\udcff"), (io.StringIO(), "gone\x1b[2J\x00\\udcff")):
        monkeypatch.setattr(sys, "stdout", stream)
        say(HOSTILE)
        assert stream.getvalue() == f"{expected}\n\tend\n"


def test_standard_error_is_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    tell(HOSTILE + "x" * 10_000_000)
    text = capsys.readouterr().err
    assert text.startswith("gone\\x1b[2J\\x00\\udcff\n\tend")
    assert len(text) < 21_000


@pytest.mark.parametrize("flags", [[], ["--debug"]])
def test_an_error_s_text_is_cleaned(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    def fail(args: object) -> None:
        raise ValueError(HOSTILE)

    command = Command(name="fail", summary="", add_arguments=lambda parser: None, run=fail)
    monkeypatch.setattr(app, "COMMANDS", (command,))
    assert app.main(["fail", *flags]) == 1
    text = capsys.readouterr().err
    assert "error: ValueError: gone\\x1b[2J\\x00\\udcff" in text
    assert "\x1b" not in text


def test_standard_output_in_a_narrow_encoding_takes_any_text() -> None:
    code = "from groupwise.cli.output import *; take_any_text(); say('日本 \\udcff'); print(input())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=b"in \xff\n",
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        timeout=60,
    )
    assert done.stdout == b"\\u65e5\\u672c \\udcff\nin \\xff\n"
    assert done.stderr == b""
