"""Runs the `test_interpreted_*` files here under Triton's interpreter, in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FILES = sorted(path.name for path in HERE.glob("test_interpreted_*.py"))


@pytest.mark.timeout(900)
@pytest.mark.extras(package="triton")
@pytest.mark.parametrize("name", FILES)
def test_kernels_on_a_cpu(name: str) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--timeout", "800", str(HERE / name)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = done.stdout.splitlines()[-1]
    assert " passed" in summary, summary
    assert "skipped" not in summary, summary
