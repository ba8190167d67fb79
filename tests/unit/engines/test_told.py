"""What engines tell beside tokens, looked at: what it must be to be learned from, and what is wrong with the rest."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from groupwise.engines.told import RawRoutes, Unusable, npy_text, usable_kept, usable_routes
from groupwise.sides import Mixture, Routes, expert_type

SMALL = Mixture(depth=3, sparse=(1, 2), experts=8, k=2)
WIDE = Mixture(depth=1, sparse=(0,), experts=300, k=2)


def chosen(rows: int, mixture: Mixture, seed: int = 0) -> Any:
    """`[rows, depth, k]`; zeros where a layer has no experts."""
    generator = np.random.default_rng(seed)
    found = np.zeros((rows, mixture.depth, mixture.k), dtype=np.int32)
    for row in range(rows):
        for layer in mixture.sparse:
            found[row, layer] = generator.permutation(mixture.experts)[: mixture.k]
    return found


def as_int32(array: Any) -> RawRoutes:
    return RawRoutes(base64.b64encode(array.astype("<i4").tobytes()).decode(), "int32")


@pytest.mark.parametrize("mixture", [SMALL, WIDE], ids=["uint8", "int16"])
@pytest.mark.parametrize("coding", ["int32", "npy", "npy of layers with experts"])
def test_layers_without_experts_are_left_out_and_numbers_are_narrow(mixture: Mixture, coding: str) -> None:
    told = chosen(5, mixture)
    own = told[:, list(mixture.sparse)]
    raw = as_int32(told) if coding == "int32" else RawRoutes(npy_text(told if coding == "npy" else own), "npy")
    found = usable_routes(raw, mixture, first=4, end=9)
    dtype = "<u1" if mixture is SMALL else "<i2"
    assert found == Routes(b"", expert_type(mixture.experts), len(mixture.sparse), 2, first=4)
    assert (found.data, found.rows, found.end) == (own.astype(dtype).tobytes(), 5, 9)
    assert bytes(found.part(5, 7)) == own[1:3].astype(dtype).tobytes()


def spoiled(**changes: Any) -> RawRoutes:
    told = chosen(5, SMALL)
    for place, value in changes.items():
        row, layer, choice = (int(number) for number in place.strip("_").split("_"))
        told[row, layer, choice] = value
    return as_int32(told)


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (None, "told of no experts"),
        (as_int32(chosen(4, SMALL)), r"are \[4, 3, 2\] numbers; expected \[5, 3, 2\]"),
        (as_int32(chosen(6, SMALL)), r"are \[6, 3, 2\]"),
        (as_int32(chosen(5, SMALL)[:, :2]), r"cannot be read|numbers; expected"),
        (spoiled(_2_1_0=8), "of expert 8, of 8"),
        (spoiled(_2_1_0=-1), "of expert -1, of 8"),
        (as_int32(np.zeros((5, 3, 2))), "twice for one token, and of zeros alone"),
        (as_int32(np.repeat(chosen(1, SMALL), 5, 0)), "the same experts for all of 5 tokens"),
        (RawRoutes("not base64!", "int32"), "cannot be read"),
        (RawRoutes("AAAA", "int32"), "cannot be read"),
        (RawRoutes("AAAA", "npy"), "cannot be read"),
        (RawRoutes("", "npy"), "cannot be read"),
        (RawRoutes(npy_text(chosen(5, SMALL).astype(float)), "npy"), "no numbers by token, layer and choice"),  # type: ignore[arg-type]
        (RawRoutes(npy_text(chosen(5, SMALL)[0]), "npy"), "no numbers by token"),
    ],
)
def test_what_cannot_be_these_tokens_is_said(raw: RawRoutes | None, said: str) -> None:
    with pytest.raises(Unusable, match=said):
        usable_routes(raw, SMALL, first=0, end=5)


def test_one_expert_twice_is_said() -> None:
    told = chosen(5, SMALL)
    told[3, 2] = 7
    with pytest.raises(Unusable, match=r"one expert twice for one token$"):
        usable_routes(as_int32(told), SMALL, first=0, end=5)


def test_objects_in_a_file_of_numpys_are_not_unpickled() -> None:
    file = io.BytesIO()
    np.save(file, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(Unusable, match="cannot be read"):
        usable_routes(RawRoutes(base64.b64encode(file.getvalue()).decode(), "npy"), SMALL, first=0, end=5)


@given(st.binary(max_size=300), st.sampled_from(["npy", "int32"]))
def test_whatever_comes_is_usable_or_said(data: bytes, coding: Any) -> None:
    try:
        found = usable_routes(RawRoutes(base64.b64encode(data).decode(), coding), SMALL, first=0, end=5)
    except Unusable:
        return
    assert found.rows == 5


@pytest.mark.parametrize(
    ("told", "said"),
    [
        (None, "did not tell which tokens"),
        ([[3, 7]], "for 1 tokens, and drew 2"),
        ([[3, 7], [8]], r"token 9 \(number 1\), which its filters had cut"),
        ([[3, 7], []], "had cut"),
        ([[3, 7], [9, 64]], "token 64, of a vocabulary of 64"),
        ([[3, -1], [9]], "of a vocabulary of 64"),
        ([[3, 3], [9]], "one token twice"),
    ],
)
def test_sets_that_cannot_be_are_said(told: Any, said: str) -> None:
    with pytest.raises(Unusable, match=said):
        usable_kept(told, (3, 9), vocabulary=64)


def test_sets_that_can_be_are_kept() -> None:
    assert list(usable_kept([[7, 3], [9]], (3, 9), vocabulary=64)) == [(7, 3), (9,)]
    assert list(usable_kept([], (), vocabulary=64)) == []
