"""Linear layers in float32 on a CPU, by oneDNN.

torch takes another library's product for float32. oneDNN's gives a row the same bits in any company as well (measured
with torch 2.13: for all multiples of 4 rows, 1 to 3 threads; with 2.11 not where a layer is 512 deep, so it is looked
at, once for each shape), and shares small products better among threads: the layers of a decode step take 0.8 of the
time with two threads, those of a training pass 0.9. While samples are drawn, small models hold their weights a second
time in oneDNN's own order, which it would make at every step again: 0.85 of the time once more, and the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

_ORDERED_BYTES = 1 << 28  # weights of a model that may be in memory twice
_ORDERED_FOR = 64  # rows that the order is made for; it serves any number
_LOOKED_AT = (16, 64, 96, 128, 256)  # rows whose bits are compared with those among more
_COMPANY = 1024  # torch 2.11 gives up to 96 rows other bits than among so many, and the same as among 256
_WIDEST = 4096  # of a layer's outputs, how many are looked at


@dataclass(frozen=True, slots=True)
class Ordered:
    """A layer whose `weight` is in oneDNN's order, and can be read by its products alone."""

    weight: Tensor
    bias: Tensor | None

    @staticmethod
    def of(weight: Tensor, bias: Tensor | None) -> Ordered:
        """From `weight [out, in]`."""
        return Ordered(torch.ops.mkldnn._reorder_linear_weight(weight, _ORDERED_FOR), bias)


@lru_cache
@torch.no_grad()
def rows_agree(n: int, k: int, has_bias: bool) -> bool:
    """Whether oneDNN gives a row the same bits in any company, of threads too, and in its own order, for a weight `[n,
    k]`."""
    generator = torch.Generator().manual_seed(0)
    n = min(n, _WIDEST)
    x, weight = (torch.randn(count, k, generator=generator) for count in (_COMPANY, n))
    bias = torch.randn(n, generator=generator) if has_bias else None
    ordered = Ordered.of(weight, bias)
    threads = torch.get_num_threads()
    whole = dnn_product(x, weight, bias)
    if not torch.equal(ordered_product(x, ordered), whole):
        return False
    try:
        for count in {1, threads}:
            torch.set_num_threads(count)
            for rows in _LOOKED_AT:
                some = x[:rows].clone()
                for found in (dnn_product(some, weight, bias), ordered_product(some, ordered)):
                    if not torch.equal(found, whole[:rows]):
                        return False
    finally:
        torch.set_num_threads(threads)
    return True


def ordered_product(x: Tensor, layer: Ordered) -> Tensor:
    return dnn_product(x, layer.weight, layer.bias)


class DnnLinear(nn.Linear):
    """What `use_dnn_linear` makes of an `nn.Linear`; in other types than float32 it is still that.

    Attributes:
        ordered: the layer in oneDNN's order, inside `ordered_weights`.
    """

    ordered: Ordered | None = None

    @property
    def computes_by_dnn(self) -> bool:
        plain = self.weight.dtype == torch.float32 and self.weight.device.type == "cpu"
        return plain and rows_agree(*self.weight.shape, self.bias is not None)

    def forward(self, input: Tensor) -> Tensor:
        if self.ordered is not None and not torch.is_grad_enabled():
            return ordered_product(input, self.ordered)
        if input.dtype != torch.float32 or not self.computes_by_dnn:
            return super().forward(input)
        return dnn_linear(input, self.weight, self.bias)

    def order(self) -> Sequence[nn.Module]:
        """Hold the weight in oneDNN's order until `forget_order`."""
        if self.computes_by_dnn:
            self.ordered = Ordered.of(self.weight, self.bias)
        return ()

    def forget_order(self) -> None:
        self.ordered = None


def dnn_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`nn.functional.linear` in float32 on a CPU, by oneDNN where torch has it."""
    if not torch.backends.mkldnn.is_available():
        return nn.functional.linear(x, weight, bias)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _DnnProduct.apply(x, weight, bias)
    return dnn_product(x, weight, bias)


def dnn_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _DnnProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return dnn_product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> ProductGradients:
        return product_gradients(ctx, grads[0].contiguous(), lambda grad, weight: dnn_product(grad, weight.t(), None))


ProductGradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def product_gradients(ctx: Any, grad: Tensor, of_input: Callable[[Tensor, Tensor], Tensor]) -> ProductGradients:
    """Gradients of a linear layer's input, weight and bias, of which `ctx` saved the first two.

    Args:
        grad: `[…, out]`, of the layer's result.
        of_input: from `grad` and the weight `[out, in]` to `[…, in]`.
    """
    x, weight = ctx.saved_tensors
    wants_x, wants_weight, wants_bias = ctx.needs_input_grad[:3]
    rows = grad.flatten(0, -2)
    of_x = of_input(grad, weight) if wants_x else None
    of_weight = _weight_gradient(rows, x.flatten(0, -2)) if wants_weight else None
    return of_x, of_weight, rows.sum(0) if wants_bias else None


def _weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """`[out, in]` from `grad [N, out]` and `x [N, in]`, in the order that is quicker (measured: 6.7 instead of 8.0 ms
    for 256 by 768, 7.0 instead of 8.4 for 768 by 256)."""
    return (x.t() @ grad).t() if x.shape[1] > grad.shape[1] else grad.t() @ x


def use_dnn_linear(model: nn.Module) -> None:
    """Let every plain `nn.Linear` of `model` compute with oneDNN, where torch has it; names and weights stay."""
    if not torch.backends.mkldnn.is_available():
        return
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = DnnLinear
            assert isinstance(module, DnnLinear)
            _ = module.computes_by_dnn  # its shape is looked at now, and not in the first step


@runtime_checkable
class Orders(Protocol):
    """A module that holds weights a second time while they do not change, in an order in which they are quicker."""

    def order(self) -> Sequence[nn.Module]:
        """Returns the modules inside whose place it takes."""
        ...

    def forget_order(self) -> None: ...


@contextmanager
def ordered_weights(model: nn.Module) -> Iterator[None]:
    """Forwards without gradients inside are quicker, if the model is small. Its weights must not change meanwhile."""
    modules = [module for module in model.modules() if isinstance(module, Orders)]
    layers = [module for module in modules if isinstance(module, DnnLinear) and module.computes_by_dnn]
    if sum(layer.weight.nbytes for layer in layers) > _ORDERED_BYTES:
        modules = []
    try:
        with torch.no_grad():
            replaced: set[nn.Module] = set()
            for module in modules:  # outer modules come first
                if module not in replaced:
                    replaced.update(module.order())
        yield
    finally:
        for module in modules:
            module.forget_order()
