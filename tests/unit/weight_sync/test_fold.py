"""The checksum that trainer and worker compute alike, against one that is written from its sentence."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from groupwise.engines.vllm_worker.groupwise_vllm_worker.fold import folds

MASK = (1 << 64) - 1
ROW = 65_536


def factor(place: int) -> int:
    """Of the place's number, from 0."""
    value = (place + 1) * 0x9E3779B97F4A7C15 & MASK
    value = (value ^ arithmetic(value, 29)) * 0xBF58476D1CE4E5B9 & MASK
    return (value ^ arithmetic(value, 32)) & MASK | 1


def arithmetic(value: int, by: int) -> int:
    """Shifted right, filled up with the sign."""
    return (value - (1 << 64) if value >> 63 else value) >> by & MASK


def reference(data: bytes) -> str:
    data += b"\0" * (-len(data) % 8)
    words = [int.from_bytes(data[at : at + 8], "little") for at in range(0, len(data), 8)]
    total = 0
    for row, begin in enumerate(range(0, len(words), ROW)):
        inside = sum(word * factor(place) for place, word in enumerate(words[begin : begin + ROW]))
        total += inside * factor((1 << 40) + row)
    return f"{total & MASK:016x}"


def of(tensor: Tensor) -> str:
    return folds([tensor])[0]


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@given(st.binary(max_size=200), st.integers(0, 9))
def test_it_is_the_sum_that_the_sentence_says(data: bytes, offset: int) -> None:
    held = torch.tensor(list(b"\1" * offset + data), dtype=torch.uint8)
    assert of(held[offset:]) == reference(data)


def test_rows_and_blocks_of_rows_are_summed_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.randint(-(2**63), 2**63 - 1, (3 * ROW + 17,), generator=torch.Generator().manual_seed(1))
    expected = reference(raw(tensor))
    assert of(tensor) == expected
    monkeypatch.setattr("groupwise.engines.vllm_worker.groupwise_vllm_worker.fold._ROWS", 2)
    assert of(tensor) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float64])
def test_it_is_of_bits_whatever_the_type_shape_and_strides(dtype: torch.dtype) -> None:
    tensor = torch.randn(7, 13).mul(20).to(dtype)
    assert of(tensor) == of(tensor.reshape(-1)) == reference(raw(tensor))
    assert of(tensor.T) == reference(raw(tensor.T.contiguous())) != of(tensor)
    assert of(tensor[:, 3:]) == reference(raw(tensor[:, 3:]))


@given(st.integers(0, 8 * 333 - 1))
def test_one_bit_is_seen(bit: int) -> None:
    tensor = torch.randint(0, 255, (333,), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    other = tensor.clone()
    other[bit // 8] ^= 1 << bit % 8
    assert of(tensor) != of(other)


def test_what_changes_places_is_seen_as_are_signs_of_zero() -> None:
    tensor = torch.randn(4 * ROW)
    rows = tensor.view(2, -1)
    assert of(tensor) != of(rows.flip(0).reshape(-1))
    assert of(torch.tensor([0.0, 1.0])) != of(torch.tensor([-0.0, 1.0]))
    assert of(torch.zeros(0)) == "0" * 16
    assert folds([]) == []
    several = [torch.randn(5), torch.randn(2, 2).bfloat16(), torch.tensor(3)]
    assert folds(several) == [of(each) for each in several]
