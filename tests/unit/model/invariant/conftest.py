"""Triton's interpreter, mended where it stumbles, for the tests that run kernels on a CPU."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A kernel is either interpreted or compiled in one process, so `test_invariant_interpreter.py` starts another."""
    skip = pytest.mark.skip(reason="run by test_invariant_interpreter.py")
    for item in items:
        if item.path.name.startswith("test_interpreted_") and not INTERPRETED:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three gaps of Triton's: a bound of a loop that numpy holds as `[1]`; products of bfloat16, which it holds as its
    16 bits and would multiply as integers; and float32 to bfloat16, where it cuts bits off, and a GPU rounds."""
    if not INTERPRETED:
        return
    from triton.runtime import interpreter

    patch, dot = interpreter._patch_lang_tensor, interpreter.InterpreterBuilder.create_dot

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def widened(handle: Any) -> Any:
        if handle.data.dtype != np.uint16:
            return handle
        data = (handle.data.astype(np.uint32) << 16).view(np.float32)
        return interpreter.TensorHandle(data, interpreter.tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, widened(a), widened(b), *rest)

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
