"""What an engine told beside tokens, looked at before a sample is learned from.

Engines have been seen to answer other requests' rows, zeros where a kernel is not asked, and rows of padding (vLLM
issues 39917 and 54730, SGLang issues 26975 and 36404): of the right shape, and without an error.
"""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from groupwise.sides import NUMPY_TYPES, Kept, Mixture, Routes, expert_type

Integers: TypeAlias = NDArray[np.integer[Any]]


class Unusable(Exception):
    """It cannot be of the request; says why."""


@dataclass(frozen=True, slots=True)
class RawRoutes:
    """Chosen experts as they came.

    Attributes:
        text: base64.
        coding: `npy`, a file of numpy's of `[rows, layers, k]`; `int32`, the numbers alone.
    """

    text: str
    coding: Literal["npy", "int32"]


def npy_text(chosen: Integers) -> str:
    """Base64 of numpy's file, as vLLM's token wire has it."""
    file = io.BytesIO()
    np.save(file, chosen, allow_pickle=False)
    return base64.b64encode(file.getvalue()).decode("ascii")


def usable_routes(raw: RawRoutes | None, mixture: Mixture, *, first: int, end: int) -> Routes:
    """Those of the tokens from position `first` up to `end`, which was not run.

    Raises:
        Unusable: none came, or they cannot be these tokens'.
    """
    if raw is None:
        raise Unusable("it told of no experts")
    told = _numbers(raw, mixture)
    rows = end - first
    wanted = (rows, mixture.depth, mixture.k)
    if told.shape != wanted and told.shape != (rows, len(mixture.sparse), mixture.k):
        raise Unusable(f"its experts are {list(told.shape)} numbers; expected {list(wanted)}: tokens, layers, choices")
    if told.shape[1] != len(mixture.sparse):
        told = told[:, list(mixture.sparse)]
    low, high = int(told.min(initial=0)), int(told.max(initial=0))
    if low < 0 or high >= mixture.experts:
        raise Unusable(f"it told of expert {low if low < 0 else high}, of {mixture.experts}")
    ordered = np.sort(told, axis=-1)
    if mixture.k > 1 and bool((ordered[..., 1:] == ordered[..., :-1]).any()):
        raise Unusable("it told of one expert twice for one token" + (", and of zeros alone" if not high else ""))
    if rows > 1 and mixture.k < mixture.experts and bool((ordered == ordered[:1]).all()):
        raise Unusable(f"it told of the same experts for all of {rows} tokens")
    dtype = expert_type(mixture.experts)
    data = told.astype(NUMPY_TYPES[dtype]).tobytes()
    return Routes(data, dtype, len(mixture.sparse), mixture.k, first)


def _numbers(raw: RawRoutes, mixture: Mixture) -> Integers:
    try:
        data = base64.b64decode(raw.text, validate=True)
        if raw.coding == "npy":
            found: Any = np.load(io.BytesIO(data), allow_pickle=False)
        else:
            found = np.frombuffer(data, "<i4").reshape(-1, mixture.depth, mixture.k)
    except (ValueError, EOFError, OSError, binascii.Error) as error:
        raise Unusable(f"its experts cannot be read: {error}") from error
    told: Integers = np.asarray(found)
    if told.ndim != 3 or told.dtype.kind not in "iu":
        raise Unusable("its experts are no numbers by token, layer and choice")
    return told


def usable_kept(told: Sequence[Sequence[int]] | None, tokens: Sequence[int], *, vocabulary: int) -> Kept:
    """The tokens that filters left, for each of `tokens`, which was drawn from them.

    Raises:
        Unusable: none came, or the tokens cannot have been drawn from these.
    """
    if told is None:
        raise Unusable("it did not tell which tokens its filters left")
    if len(told) != len(tokens):
        raise Unusable(f"it told what its filters left for {len(told)} tokens, and drew {len(tokens)}")
    for number, (left, token) in enumerate(zip(told, tokens, strict=True)):
        if token not in left:
            raise Unusable(f"it drew token {token} (number {number}), which its filters had cut")
        if not 0 <= min(left) <= max(left) < vocabulary:
            raise Unusable(f"its filters left token {max(left)}, of a vocabulary of {vocabulary}")
        if len(set(left)) != len(left):
            raise Unusable(f"its filters left one token twice (number {number})")
    return Kept.of(told)
