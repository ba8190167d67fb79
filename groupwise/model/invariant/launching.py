"""What every kernel's launch needs: one compiled form for all calls.

Triton compiles a kernel again for other properties of its arguments (a pointer that is or is not a multiple of 16
bytes, an integer that is or is not a multiple of 16, or is 1), and another form may add in another order. So pointers
are aligned here, and what depends on the number of rows is in the kernels' `do_not_specialize`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_ALIGNMENT = 16


def launch(kernel: Any, programs: tuple[int, ...], *tensors: Tensor, **arguments: Any) -> None:
    """Run `programs` of a Triton kernel, if any, on the device of its tensors, which are its first arguments."""
    if all(programs):
        with torch.cuda.device_of(tensors[0]):
            kernel[programs](*tensors, **arguments)


def aligned(x: Tensor) -> Tensor:
    """`x` contiguous, from an address that is a multiple of 16 bytes on."""
    x = x.contiguous()
    return x.clone() if x.data_ptr() % _ALIGNMENT else x


def power_of_two(n: int) -> int:
    """The least power of two that is no less than `n`."""
    return 1 << max(0, n - 1).bit_length()
