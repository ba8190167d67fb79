from __future__ import annotations

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource
import torch
from groupwise.model.host_memory import keep_freed_memory

{ask}
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    held = [torch.ones(10_000_000) for _ in range(4)]  # 40 MB each
    del held
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(*[faults() for _ in range(8)])
"""


def faults(ask: str) -> int:
    """Of the last four of eight rounds."""
    program = PROGRAM.format(ask=ask)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=100)
    return sum(int(count) for count in done.stdout.split()[4:])


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="asks glibc")
def test_freed_memory_is_used_again_without_page_faults() -> None:
    assert faults("") > 100_000
    assert faults("assert keep_freed_memory()") < 10_000
