"""Triton's interpreter, mended where it stumbles, for the tests that run kernels on a CPU."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A kernel is either interpreted or compiled in one process, so `test_invariant_interpreter.py` starts another."""
    skip = pytest.mark.skip(reason="run by test_invariant_interpreter.py")
    for item in items:
        if item.path.name.startswith("test_interpreted_") and not INTERPRETED:
            item.add_marker(skip)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(autouse=True)
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gaps of Triton's: a bound of a loop that numpy holds as `[1]`; products of bfloat16, which it holds as 16 bits
    and would multiply as integers; float32 to bfloat16, where it cuts bits off, and a GPU rounds; and a row's bits in a
    product, which in numpy's library hang on its place in the tile (seen on processors without AVX-512)."""
    if not INTERPRETED:
        return
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def widened(data: Any) -> Any:
        return (data.astype(np.uint32) << 16).view(np.float32) if data.dtype == np.uint16 else data

    def create_dot(_: Any, a: Any, b: Any, total: Any, *rest: Any) -> Any:
        left, right, out = widened(a.data), widened(b.data), total.data.copy()
        for k in range(left.shape[1]):
            out += left[:, k, None] * right[k]
        return interpreter.TensorHandle(out, total.dtype.scalar)

    cast = interpreter.InterpreterBuilder.cast_impl

    def rounded(self: Any, source: Any, kind: Any) -> Any:
        if source.dtype.scalar != interpreter.tl.float32 or kind.scalar != interpreter.tl.bfloat16:
            return cast(self, source, kind)
        bits = np.ascontiguousarray(source.data).view(np.uint32).astype(np.uint64)
        nearest = (bits + 0x7FFF + ((bits >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)  # ties to even
        nearest = np.where(np.isnan(source.data), np.uint64(0x7FC0), nearest).astype(np.uint16)
        return interpreter.TensorHandle(nearest, kind.scalar)

    for name in ("cast_impl", "create_fp_trunc"):
        monkeypatch.setattr(interpreter.InterpreterBuilder, name, rounded)
    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
