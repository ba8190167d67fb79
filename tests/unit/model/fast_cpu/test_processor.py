"""In processes of their own: oneDNN looks at the limit once, at its first product."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from groupwise.model.fast_cpu.processor import EXACT, LIMIT

PROGRAM = """
import logging
logging.basicConfig(format="%(message)s")
from groupwise.model.fast_cpu.processor import check_rows_are_exact, limit_units, rows_are_exact
{before}
limit_units()
check_rows_are_exact()
print(rows_are_exact())
"""
needs_amx = pytest.mark.skipif(not torch.cpu._is_amx_tile_supported(), reason="needs a CPU with AMX")


def run(before: str = "", *, threads: int = 1, **environment: str) -> tuple[str, str]:
    clean = {name: value for name, value in os.environ.items() if name != LIMIT}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(before=before)],
        env={**clean, "OMP_NUM_THREADS": str(threads), **environment},
        capture_output=True,
        text=True,
        check=True,
        timeout=100,
    )
    return done.stdout.strip(), done.stderr.strip()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_rows_have_their_bits_in_any_company(threads: int) -> None:
    assert run(threads=threads) == ("True", "")


@needs_amx
def test_what_comes_too_late_or_is_asked_otherwise_is_said() -> None:
    for said, warning in (run("rows_are_exact()"), run(**{LIMIT: "AVX512_CORE_AMX"})):  # pyright: ignore[reportArgumentType]
        assert said == "False"
        assert f"start the program with {LIMIT}={EXACT}" in warning
