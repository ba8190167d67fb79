"""What the C library holds is asked of the library itself, in bytes; a host under pressure changes nothing about it."""

from __future__ import annotations

import json
import platform
import subprocess
import sys

import pytest

MIB = 1 << 20
PROGRAM = """
import ctypes, json, threading
import torch
from groupwise.model.fast_cpu.host_memory import keep_freed_memory

class Info(ctypes.Structure):  # struct mallinfo2 of malloc.h
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")]

ask = ctypes.CDLL(None).mallinfo2
ask.restype = Info

def take(count):
    held = [torch.ones(10_000_000) for _ in range(count)]  # 40 MB each

def in_thread(count):
    thread = threading.Thread(target=take, args=(count,))
    thread.start()
    thread.join()

{ask}
sizes = []
for count in 30 * [4]:
    {where}(count)
    info = ask()
    sizes.append([info.arena, info.fordblks])
print(json.dumps(sizes))
"""


def heap(ask: str, where: str) -> list[tuple[int, int]]:
    """After each of twelve rounds: bytes of the heaps, and those of them that are free."""
    program = PROGRAM.format(ask=ask, where=where)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=100)
    return [(size, free) for size, free in json.loads(done.stdout)]


def has_mallinfo2() -> bool:
    name, number = platform.libc_ver()
    return name == "glibc" and tuple(map(int, number.split(".")[:2])) >= (2, 33)


@pytest.mark.skipif(not has_mallinfo2(), reason="asks glibc 2.33 or newer")
@pytest.mark.parametrize("where", [pytest.param("take", marks=pytest.mark.slow), "in_thread"])
def test_freed_memory_stays_and_is_used_again(where: str) -> None:
    assert all(free < 40 * MIB for _, free in heap("", where))
    kept = heap("assert keep_freed_memory()", where)
    assert all(free > 150 * MIB for _, free in kept)
    # Thirty rounds of 153 MiB would take 4,578 without it; holes that are too small by an alignment cost some.
    assert kept[-1][0] < 1024 * MIB
    assert kept[-1][0] == kept[-2][0]


GIVING_BACK = """
from pathlib import Path
from groupwise.model.fast_cpu.host_memory import give_freed_memory_back
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
assert keep_freed_memory(WIDTH)
small = [torch.ones(1_000_000) for _ in range(100)]  # 4 MB each
kept = [torch.ones(10) for _ in range(10)]
del small
before = resident()
give_freed_memory_back(WIDTH)
print(json.dumps([before, resident()]))
raise SystemExit
"""


@pytest.mark.skipif(not has_mallinfo2(), reason="asks glibc 2.33 or newer")
@pytest.mark.parametrize(("width", "least", "most"), [(256, 0, 8), (512, 300, 500)])
def test_a_wide_model_gives_back_what_is_free(width: int, least: int, most: int) -> None:
    program = PROGRAM.format(ask=GIVING_BACK.replace("WIDTH", str(width)), where="take")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=100)
    before, after = json.loads(done.stdout)
    assert before > 400 * 1_000_000
    assert least * MIB <= before - after <= most * MIB


@pytest.mark.skipif(not has_mallinfo2(), reason="asks glibc 2.33 or newer")
@pytest.mark.slow
def test_of_a_wide_model_blocks_of_8_mib_go_at_once() -> None:
    assert all(free < 40 * MIB for _, free in heap("assert keep_freed_memory(512)", "take"))
