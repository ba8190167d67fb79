"""Every kernel compiles for an H100 without one: tensor cores, loads ahead of use, hardly a register in memory."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.extras(package="triton")

NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32"}


def compiled(kernel: Any, types: dict[str, str], constants: dict[str, Any], **options: int) -> Any:
    """For compute capability 9.0; pointers are multiples of 16, as `aligned` makes them."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = types | dict.fromkeys(constants, "constexpr")
    assert set(signature) == set(kernel.arg_names)
    place = kernel.arg_names.index
    attributes = {(place(name),): [["tt.divisibility", 16]] for name, kind in types.items() if kind.startswith("*")}
    source = ASTSource(kernel, signature, {(place(name),): value for name, value in constants.items()}, attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def spilled(built: Any, folder: Path) -> int:
    """Bytes of a thread's stack."""
    from triton import knobs

    file = folder / "kernel.cubin"
    file.write_bytes(built.asm["cubin"])
    command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(file)]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (stack,) = re.findall(r"STACK:(\d+)", usage)
    return int(stack)


@pytest.mark.parametrize("dtype", list(NAMES), ids=NAMES.values())
@pytest.mark.parametrize(("n", "k"), [(2048, 1024), (151_936, 1024), (1024, 3072), (16, 1024), (1024, 16), (3, 92)])
def test_product(n: int, k: int, dtype: torch.dtype, tmp_path: Path) -> None:
    from groupwise.model.invariant.matmul_kernel import Tiling, product_kernel

    tiling = Tiling.of(n, k, dtype)
    types = dict.fromkeys(("x_ptr", "weight_ptr", "bias_ptr", "out_ptr"), f"*{NAMES[dtype]}") | {"M": "i32"}
    constants = tiling.constants(n, k, has_bias=True)
    built = compiled(product_kernel, types, constants, num_warps=tiling.warps, num_stages=tiling.stages)
    instructions = set(re.findall(r"(wgmma\.mma_async\.\S+|mma\.sync\.\S+)", built.asm["ptx"]))
    if dtype == torch.bfloat16:
        assert instructions == {f"wgmma.mma_async.sync.aligned.m64n{tiling.block_n}k16.f32.bf16.bf16"}
    else:
        assert not instructions, "float32 is not rounded to TF32"
    if k > tiling.block_k and k % 16 == 0:
        assert "cp.async" in built.asm["ptx"]
    assert spilled(built, tmp_path) == 0


@pytest.mark.parametrize("dtype", list(NAMES), ids=NAMES.values())
@pytest.mark.parametrize(("repeat", "size", "window"), [(2, 128, None), (7, 64, None), (4, 256, 1024)])
def test_attention(repeat: int, size: int, window: int | None, dtype: torch.dtype, tmp_path: Path) -> None:
    from groupwise.model.invariant.attention_kernel import attention_kernel, constants_of, options_of

    constants = constants_of(8, repeat, size, scale=size**-0.5, window=window)
    types = {name: "i32" for name in attention_kernel.arg_names if name not in constants}  # pyright: ignore[reportFunctionMemberAccess]
    types |= {name: f"*{NAMES[dtype]}" for name in types if name.endswith("_ptr")}
    types |= {"tiles_ptr": "*i64", "log_mass_ptr": "*fp32"}
    built = compiled(attention_kernel, types, constants, **options_of(dtype, size))
    instructions = set(re.findall(r"(wgmma\.mma_async\.\S+|mma\.sync\.\S+)", built.asm["ptx"]))
    if dtype == torch.bfloat16:
        assert instructions == {"mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"}
        assert "cp.async" in built.asm["ptx"]
        assert spilled(built, tmp_path) <= 8  # one number, where heads are divided by 7
    else:
        assert not instructions, "float32 is not rounded to TF32"


def test_sum(tmp_path: Path) -> None:
    from groupwise.model.invariant.rows_kernel import SUM_BLOCK, sum_kernel

    types = {"x_ptr": "*fp32", "out_ptr": "*fp32"}
    built = compiled(sum_kernel, types, {"SIZE": 151_936, "BLOCK": SUM_BLOCK}, num_warps=8)
    assert spilled(built, tmp_path) == 0


def test_the_number_of_rows_compiles_nothing_again() -> None:
    """No number but those that a weight's or a head's shape gives is a reason for another form of a kernel."""
    from groupwise.model.fast_gpu.norm_kernel import add_norm_kernel
    from groupwise.model.invariant.attention_kernel import attention_kernel
    from groupwise.model.invariant.matmul_kernel import product_kernel
    from groupwise.model.invariant.rows_kernel import sum_kernel

    numbers = [
        parameter
        for kernel in (attention_kernel, product_kernel, add_norm_kernel, sum_kernel)
        for parameter in kernel.params  # pyright: ignore[reportFunctionMemberAccess]
        if not parameter.is_constexpr and not parameter.name.endswith("_ptr")
    ]
    assert [number.name for number in numbers] == [
        *("prefix_by_token", "prefix_by_head", "own_by_token", "own_by_head"),
        *("M", "M"),
    ]
    assert all(number.do_not_specialize for number in numbers)
