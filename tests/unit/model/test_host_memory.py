from __future__ import annotations

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, threading
import torch
from groupwise.model.host_memory import keep_freed_memory

{ask}
def take():
    held = [torch.ones(10_000_000) for _ in range(4)]  # 40 MB each

def in_thread():
    thread = threading.Thread(target=take)
    thread.start()
    thread.join()

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    {where}
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(*[faults() for _ in range(8)])
"""


def faults(ask: str, where: str) -> int:
    """Of the last four of eight rounds."""
    program = PROGRAM.format(ask=ask, where=where)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=100)
    return sum(int(count) for count in done.stdout.split()[4:])


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="asks glibc")
@pytest.mark.parametrize("where", ["take()", "in_thread()"])
def test_freed_memory_is_used_again_without_page_faults(where: str) -> None:
    assert faults("", where) > 100_000
    assert faults("assert keep_freed_memory()", where) < 10_000
