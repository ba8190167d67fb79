"""Memory of CPU tensors stays with the process when they are freed.

By default glibc gives every large block back to the system, and the next one comes page by page, each page zeroed at
its first touch. Activations come and go thousands of times in a run: measured, four training steps of a small model
took 820,000 page faults, and 6,000 with this.

Threads that begin later take from the one heap that is there. A heap of a thread's own gives large blocks back,
whatever is asked (measured: 40,000 page faults in a step with two lanes, and 20 with this).

The largest blocks are still given back: a chunk of logits finds no hole of its size in memory that smaller tensors
have since been put into, so memory grew with every chunk (measured: 653 MiB instead of 145 at 8,192 tokens and a
vocabulary of 32,768). Beside the work on a block of that size, its page faults are nothing.

A wide model does more work on each byte, and has larger blocks, whose holes add up: it keeps smaller ones alone, and
gives back what is free after each update (measured, ten layers 512 wide with LoRA: the peak of a step went from 1.7 to
2.9 GiB in twelve steps, and to 2.1 with this, in the same seconds of the processor).

What is read from end to end again and again, as a cache of keys is, lies in large pages where Linux has them: a
processor that looks up a page's place for every 4 KiB reads more slowly (measured: sums over 400 MB at 24 and 31 GB/s,
products of keys and queries at 17 and 20).
"""

from __future__ import annotations

import ctypes
import math
import mmap
import platform
from collections.abc import Sequence

import torch
from torch import Tensor

_TRIM_THRESHOLD = -1  # parameters of mallopt(3)
_MMAP_THRESHOLD = -3
_HEAPS = -8
_MOST = 2**31 - 1
_GIVEN_BACK = 1 << 26  # bytes, from which a block is given back
_GIVEN_BACK_WIDE = 1 << 23
_WIDE = 512  # hidden size
_LARGE_PAGE = 1 << 21  # bytes; most processors' and Linux's


def keep_freed_memory(width: int = 0) -> bool:
    """Ask the C library to keep what is freed; returns whether it will. Only glibc is asked.

    Args:
        width: the model's hidden size, where it is known.
    """
    if not _is_glibc():
        return False
    libc = ctypes.CDLL(None)
    given_back = _GIVEN_BACK_WIDE if width >= _WIDE else _GIVEN_BACK
    wanted = {_MMAP_THRESHOLD: given_back, _TRIM_THRESHOLD: _MOST, _HEAPS: 1}
    return all(libc.mallopt(name, value) for name, value in wanted.items())


def give_freed_memory_back(width: int) -> None:
    """Of a wide model, to the system; the next pass takes it again. A narrow one's stays, and levels off."""
    if width >= _WIDE and _is_glibc():
        ctypes.CDLL(None).malloc_trim(0)


def _is_glibc() -> bool:
    return platform.libc_ver()[0] == "glibc"


def zeros_in_large_pages(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """`torch.zeros` on a CPU, in large pages where the system has them; small tensors, and others, are plain ones."""
    count = math.prod(shape)
    size = count * dtype.itemsize
    if size < 2 * _LARGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(tuple(shape), dtype=dtype)
    memory = mmap.mmap(-1, size + _LARGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a kernel that was built without
        return torch.zeros(tuple(shape), dtype=dtype)
    whole = torch.frombuffer(memory, dtype=torch.uint8)  # keeps `memory` alive
    first = -whole.data_ptr() % _LARGE_PAGE
    return whole[first : first + size].view(dtype).view(tuple(shape))
