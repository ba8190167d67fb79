"""The fused layers' kernels compile for an H100 without one, and keep their numbers in registers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from .test_invariant_compiled import NAMES, compiled, spilled

pytestmark = pytest.mark.extras(package="triton")


def types_of(kernel: Any, constants: dict[str, Any], dtype: torch.dtype, **others: str) -> dict[str, str]:
    names = [name for name in kernel.arg_names if name not in constants]
    kinds = {name: f"*{NAMES[dtype]}" if name.endswith("_ptr") else "i32" for name in names}
    return kinds | {name: kind for name, kind in others.items() if name in kinds}


@pytest.mark.parametrize("dtype", list(NAMES), ids=NAMES.values())
@pytest.mark.parametrize("size", [128, 1024, 2048, 4096])
def test_norms(size: int, dtype: torch.dtype, tmp_path: Path) -> None:
    from groupwise.model.fast_gpu.norm_kernel import add_norm_kernel, backward_warps, norm_backward_kernel, norm_sizes

    forward, backward = (add_norm_kernel, 4), (norm_backward_kernel, backward_warps(dtype))
    for adds in (True, False):
        for (kernel, warps), more in (
            (forward, {"UNIT_OFFSET": False}),
            (forward, {"UNIT_OFFSET": True}),
            (backward, {}),
        ):
            constants = {"epsilon": 1e-6, "ADDS": adds, **more, **norm_sizes(size)}
            types = types_of(kernel, constants, dtype, of_weight_ptr="*fp32")
            assert spilled(compiled(kernel, types, constants, num_warps=warps), tmp_path) == 0


@pytest.mark.parametrize("dtype", list(NAMES), ids=NAMES.values())
@pytest.mark.parametrize("norms", [True, False])
@pytest.mark.parametrize(("heads", "few", "size"), [(16, 8, 128), (32, 8, 128), (14, 2, 64)])
def test_rotations(heads: int, few: int, size: int, norms: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    from groupwise.model.fast_gpu.rotary_kernel import _constants, rotary_backward_kernel, rotary_kernel

    sizes = {"epsilon": 1e-6, "NORMS": norms, **_constants(size)}
    warps = sizes.pop("num_warps")
    forward = {"query_by_token": heads * size, "key_by_token": few * size, "QUERY_HEADS": heads, "KEY_HEADS": few}
    for kernel, more in (
        (rotary_kernel, forward),
        (rotary_backward_kernel, {"by_token": heads * size, "HEADS": heads}),
    ):
        constants = {**sizes, **more}
        built = compiled(kernel, types_of(kernel, constants, dtype, of_weight_ptr="*fp32"), constants, num_warps=warps)
        assert spilled(built, tmp_path) <= 8  # one number, in float32


@pytest.mark.parametrize("dtype", list(NAMES), ids=NAMES.values())
def test_gates(dtype: torch.dtype, tmp_path: Path) -> None:
    from groupwise.model.fast_gpu.gate_kernel import _BLOCK, gate_backward_kernel, gate_kernel

    for kernel in (gate_kernel, gate_backward_kernel):
        constants = {"by_row": 3072, "SIZE": 3072, "BLOCK": _BLOCK}
        built = compiled(kernel, types_of(kernel, constants, dtype), constants, num_warps=4)
        assert spilled(built, tmp_path) == 0
        assert ".v4" in built.asm["ptx"], "whole vectors are loaded"


@pytest.mark.parametrize("dtype", list(NAMES), ids=NAMES.values())
@pytest.mark.parametrize("tempered", [True, False])
def test_scores(tempered: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    from groupwise.model.fast_gpu import scores_kernel as scores

    count = -(-151_936 // scores._BLOCK)
    of_head = {"by_row": 151_936, "TEMPERED": tempered}
    blocks = {**of_head, "SIZE": 151_936, "BLOCK": scores._BLOCK}
    kernels = (
        (scores.weigh_kernel, {**blocks, "COUNT": count, "KEEPS": True}),
        (scores.weigh_kernel, {**blocks, "COUNT": count, "KEEPS": False}),
        (scores.pick_kernel, {**blocks, "COUNT": count, "BLOCKS": 64, "GREEDY": tempered}),
        (scores.logprob_kernel, of_head),
        (scores.logprob_backward_kernel, blocks),
    )
    numbers = ("temperature_ptr", "top_ptr", "mass_ptr", "blocks_ptr", "grad_ptr", "out_ptr")
    others = dict.fromkeys(numbers, "*fp32") | {"uniform_ptr": "*fp64", "token_ptr": "*i64", "target_ptr": "*i64"}
    for kernel, constants in kernels:
        built = compiled(kernel, types_of(kernel, constants, dtype, **others), constants, num_warps=scores._WARPS)
        assert spilled(built, tmp_path) == 0
