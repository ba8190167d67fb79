"""A checksum of a tensor's bits that is computed where the tensor lies, and is the same on every device.

The bytes are read as words of 64 bits, the last one filled up with zeros, in rows of 65,536. A row's sum is that of its
words, each times an odd number that its place decides; the checksum is the sum of the rows' sums, each times an odd
number likewise. All of it modulo 2^64, so no order of additions changes it. An odd factor can be undone, so no change
of one word is missed; others are with a chance of about 2^-64. It finds damage and not malice.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

_ROW = 1 << 16
_ROWS = 64
"""Rows that are summed at a time: 32 MiB of words, and as much beside them."""

_STEP, _MIX = -7046029254386353131, -4658895280553007687  # 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9
_ROWS_BEGIN = 1 << 40


def folds(tensors: Iterable[Tensor]) -> list[str]:
    """The checksum of each, in 16 hexadecimal digits."""
    found = [_fold(tensor.detach()) for tensor in tensors]
    return [f"{value % (1 << 64):016x}" for value in _numbers(found)]


def _numbers(found: list[Tensor]) -> list[int]:
    """All of a device are fetched at once."""
    if not found:
        return []
    if len({each.device for each in found}) == 1:
        return [int(each) for each in torch.stack(found).cpu()]
    return [int(each) for each in found]


def _fold(tensor: Tensor) -> Tensor:
    data = tensor.contiguous().reshape(-1).view(torch.uint8)
    words = _words(data)
    factors = _factors(0, _ROW, words.device)
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    for begin in range(0, words.numel(), _ROW * _ROWS):
        part = words[begin : begin + _ROW * _ROWS]
        rows = part.numel() // _ROW
        sums = (part[: rows * _ROW].view(rows, _ROW) * factors).sum(1)
        if rest := part[rows * _ROW :].numel():
            sums = torch.cat([sums, (part[rows * _ROW :] * factors[:rest]).sum()[None]])
        total += (sums * _factors(_ROWS_BEGIN + begin // _ROW, sums.numel(), words.device)).sum()
    return total


def _words(data: Tensor) -> Tensor:
    """Bytes as words; a copy where they do not begin at a word's place, or do not end at one."""
    if missing := -data.numel() % 8:
        data = torch.cat([data, data.new_zeros(missing)])
    if data.storage_offset() % 8:
        data = data.clone()
    return data.view(torch.int64)


def _factors(begin: int, count: int, device: torch.device) -> Tensor:
    """Odd numbers for these places."""
    places = torch.arange(begin + 1, begin + count + 1, dtype=torch.int64, device=device) * _STEP
    places = (places ^ (places >> 29)) * _MIX
    return (places ^ (places >> 32)) | 1
