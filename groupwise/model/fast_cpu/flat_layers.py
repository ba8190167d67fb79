"""A decoder layer as one function of tensors, for passes that are too short to pay for modules.

A decode step of a small model waits for Python as long as for products: every call of a module, and every look-up of a
weight in one, costs as much as a small operation. While samples are drawn (`ordered_weights`) weights do not change, so
all of it is looked up once. Queries, keys and values are then one product, one norm and one rotation.

The operations are those of the modules, and so are the bits.

Shapes: N tokens, hidden states `[N, D]`, heads of size d.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from groupwise.model.fast_cpu.linear import DnnLinear, Ordered, ordered_product
from groupwise.model.fast_cpu.norms import LeanNorm, normalised
from groupwise.model.forward.attention import AttentionCall, Layout

Function = Callable[[Tensor], Tensor]
Turn = Callable[[Tensor], Tensor]
"""Rotates `[N, heads, d]`."""
Project = Callable[[Tensor, Turn], tuple[Tensor, Tensor, Tensor]]
"""From hidden states to rotated queries `[N, Hq, d]` and keys, and values `[N, Hkv, d]`."""


@dataclass(frozen=True, slots=True)
class FlatLayer:
    """Overwrites nothing that it is given."""

    call: AttentionCall
    before: Function
    project: Project
    output: Function
    after: Function
    mlp: Function

    def __call__(self, hidden: Tensor, turn: Turn, layout: Layout) -> Tensor:
        """`[N, D]` hidden states behind the layer."""
        query, key, value = self.project(self.before(hidden), turn)
        hidden = self.output(layout.attend(self.call, query, key, value).flatten(1)).add_(hidden)
        return self.mlp(self.after(hidden)).add_(hidden)


def flat_norm(norm: nn.Module) -> Function:
    if type(norm) is not LeanNorm:  # a batch-invariant one computes otherwise
        return norm
    return partial(normalised, weight=norm.weight, epsilon=_epsilon_of(norm))


def flat_linear(layer: nn.Module) -> Function:
    if isinstance(layer, DnnLinear) and layer.computes_by_dnn:
        return partial(ordered_product, layer=Ordered.of(layer.weight, layer.bias))
    return layer


def flat_mlp(mlp: Any) -> Function:
    """A gated MLP, whose activation computes into memory of its own; gate and up by one product, where they are plain
    and in float32."""
    gate, up, down = (flat_linear(layer) for layer in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    activation = mlp.act_fn.forward
    layers = [mlp.gate_proj, mlp.up_proj]
    if not all(isinstance(layer, DnnLinear) and layer.computes_by_dnn and layer.bias is None for layer in layers):
        return lambda x: down(activation(gate(x)).mul_(up(x)))
    both = Ordered.of(torch.cat([layer.weight for layer in layers]), None)

    def joined(x: Tensor) -> Tensor:
        gated, along = ordered_product(x, both).chunk(2, -1)
        return down(activation(gated).mul_(along))

    return joined


def flat_projection(attention: Any, norms: Sequence[nn.Module]) -> Project:
    """Queries, keys and values; by one product, where the layers are plain and in float32.

    Args:
        norms: those of queries and keys, if the architecture has them.
    """
    layers = [attention.q_proj, attention.k_proj, attention.v_proj]
    plain = all(isinstance(layer, DnnLinear) and layer.computes_by_dnn for layer in layers)
    if plain and all(type(norm) is LeanNorm for norm in norms):
        return _joined(layers, norms, attention.head_dim)
    asking, keys, values = (flat_linear(layer) for layer in layers)
    asking_norm, keys_norm = (flat_norm(norm) for norm in norms) if norms else (None, None)
    size = attention.head_dim

    def project(x: Tensor, turn: Turn) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = (layer(x).unflatten(-1, (-1, size)) for layer in (asking, keys, values))
        if asking_norm is not None and keys_norm is not None:
            query, key = asking_norm(query), keys_norm(key)
        return turn(query), turn(key), value

    return project


def _joined(layers: Sequence[Any], norms: Sequence[Any], size: int) -> Project:
    bias = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])
    product = Ordered.of(torch.cat([layer.weight for layer in layers]), bias)
    asking, few, _ = (layer.out_features // size for layer in layers)
    normed: Function | None = None
    if norms:
        weights = [w.expand(n, size) for w, n in zip((norm.weight for norm in norms), (asking, few), strict=True)]
        normed = partial(normalised, weight=torch.cat(weights), epsilon=_epsilon_of(norms[0]))

    def project(x: Tensor, turn: Turn) -> tuple[Tensor, Tensor, Tensor]:
        heads = ordered_product(x, product).view(x.shape[0], -1, size)
        asked, value = heads.split_with_sizes((asking + few, few), 1)
        query, key = turn(asked if normed is None else normed(asked)).split_with_sizes((asking, few), 1)
        return query, key, value

    return project


def _epsilon_of(norm: Any) -> float | Tensor:
    """On a CPU a tensor: a plain number is made one at each use."""
    epsilon = norm.variance_epsilon
    return torch.tensor(epsilon, dtype=torch.float32) if norm.weight.device.type == "cpu" else epsilon
