"""Frozen weights in 4 bits (NF4 with double quantisation; QLoRA, Dettmers et al. 2023, section 3) by bitsandbytes.

bitsandbytes multiplies by kernels of its own, which depend on the number of rows, and on some CPUs have no gradient.
Here a layer's weights are unpacked before each product, so that it is the product of an ordinary layer: each row has
the same bits in any company, on every device, in sampling and in training.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import BitsAndBytesConfig


def nf4_settings(dtype: torch.dtype) -> BitsAndBytesConfig:
    """For `from_pretrained`."""
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def is_packed(model: nn.Module) -> bool:
    """Whether its frozen weights have 4 bits."""
    return bool(vars(model).get("is_loaded_in_4bit"))


def unpack_before_products(model: nn.Module) -> None:
    """Make every 4-bit layer of the module compute as an ordinary one."""
    from bitsandbytes.nn import Linear4bit  # pyright: ignore[reportMissingImports]

    for module in model.modules():
        if type(module) is Linear4bit:
            module.__class__ = _layer_class()


class _Product(torch.autograd.Function):
    """x W^T + b; W is unpacked again in the backward pass, so that it never stays."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, state: Any, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(packed)
        ctx.state = state
        return linear(x, _unpacked(packed, state, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (packed,) = ctx.saved_tensors
        return grads[0] @ _unpacked(packed, ctx.state, grads[0].dtype), None, None, None


def _unpacked(packed: Tensor, state: Any, dtype: torch.dtype) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit  # pyright: ignore[reportMissingImports]

    return dequantize_4bit(packed, state).to(dtype)


@cache
def _layer_class() -> type[nn.Module]:
    """bitsandbytes' own class, so that peft knows it, with another forward."""
    from bitsandbytes.nn import Linear4bit  # pyright: ignore[reportMissingImports]

    class UnpackedLinear4bit(Linear4bit):
        def forward(self, x: Tensor) -> Tensor:
            result: Any = _Product.apply(x, self.weight.data, self.weight.quant_state, self.bias)
            return result

    return UnpackedLinear4bit
