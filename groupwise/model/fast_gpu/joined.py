"""Weights that share their input lie one after the other, so that a decode step takes one product for all of them.

Each stays a parameter of its own, with its name: a view of the common memory. Updates in place, loading and saving see
no difference; where somebody puts another tensor in a parameter's place, the product is as many again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

_NAME = "_groupwise_joined"


@dataclass(frozen=True, slots=True)
class Joined:
    """`weight [N, K]`, `bias [N]`: those of some layers below each other; `sizes` are their N."""

    weight: Tensor
    bias: Tensor | None
    sizes: tuple[int, ...]

    def __call__(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)

    def holds(self, layers: Sequence[nn.Linear]) -> bool:
        """Whether the layers' weights are still the parts of this one."""
        weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers if layer.bias is not None]
        return _are_parts(weights, self.weight) and (self.bias is None or _are_parts(biases, self.bias))


def _is_plain(layer: nn.Module) -> bool:
    return type(layer) is nn.Linear


def _are_parts(parts: Sequence[Tensor], whole: Tensor) -> bool:
    at = whole.data_ptr()
    for part in parts:
        if part.data_ptr() != at or part.dtype != whole.dtype or not part.is_contiguous():
            return False
        at += part.numel() * part.itemsize
    return at == whole.data_ptr() + whole.numel() * whole.itemsize


@torch.no_grad()
def join(owner: nn.Module, layers: Sequence[Any]) -> None:
    """Lay the weights of `layers`, children of `owner`, into common memory, if they are plain linear layers alike."""
    if (
        not all(map(_is_plain, layers))
        or len({(layer.bias is None, layer.weight.dtype, layer.in_features) for layer in layers}) != 1
    ):
        return
    sizes = tuple(layer.out_features for layer in layers)
    weight = torch.cat([layer.weight for layer in layers])
    bias = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])
    for layer, part in zip(layers, weight.split(sizes), strict=True):
        layer.weight.data = part
    if bias is not None:
        for layer, part in zip(layers, bias.split(sizes), strict=True):
            layer.bias.data = part
    setattr(owner, _NAME, Joined(weight, bias, sizes))


def joined_of(owner: nn.Module, layers: Sequence[nn.Linear]) -> Joined | None:
    """What `join` made, as long as it holds."""
    found = getattr(owner, _NAME, None)
    if not all(map(_is_plain, layers)):  # an adapter around one shows its weight as its own
        return None
    return found if isinstance(found, Joined) and found.holds(layers) else None
