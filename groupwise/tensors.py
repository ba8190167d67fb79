"""Tensors to plain numbers, with their types, which torch leaves open."""

from __future__ import annotations

from typing import cast

from torch import Tensor


def floats(values: Tensor) -> list[float]:
    """`[n]` numbers of a vector."""
    return cast("list[float]", values.tolist())  # pyright: ignore[reportUnknownMemberType]


def ints(values: Tensor) -> list[int]:
    """`[n]` whole numbers of a vector."""
    return cast("list[int]", values.tolist())  # pyright: ignore[reportUnknownMemberType]
