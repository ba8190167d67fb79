"""A short run of the fuzzer: hostile inputs of every kind end in time, with a right exit code and a sentence."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KINDS = ("recipes", "rows", "templates", "folders", "runs", "commands")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="each input is a fork")
@pytest.mark.parametrize("kind", KINDS)
def test_hostile_inputs(kind: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", "--kind", kind, "--inputs", "60"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "60 inputs" in done.stdout
