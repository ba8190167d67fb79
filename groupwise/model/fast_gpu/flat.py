"""The decoder of a decode step on a GPU as one function: about ten kernels a layer, and no module in between.

The sums before norms are fused with them across layers. Rows get the bits that the modules give them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from groupwise.model.fast_gpu.joined import joined_of
from groupwise.model.forward.attention import AttentionCall, Layout


def weights_of(norms: Sequence[Any]) -> tuple[Tensor, Tensor] | None:
    """Of queries' and keys' norms, `[d]` each; None where there are none."""
    return (norms[0].weight, norms[1].weight) if norms else None


def epsilon_of(norms: Sequence[Any]) -> float:
    return norms[0].variance_epsilon if norms else 0.0


def joinable(decoder: Any) -> bool:
    """Whether all norms are of the kind that the kernels compute, those of rows with one epsilon."""
    from groupwise.model.fast_cpu.norms import LeanNorm

    norms = [decoder.norm]
    for layer in decoder.layers:
        norms += [layer.input_layernorm, layer.post_attention_layernorm]
    of_heads = [norm for layer in decoder.layers for norm in layer.self_attn.norms]
    if not all(isinstance(norm, LeanNorm) for norm in [*norms, *of_heads]):
        return False
    return len({norm.variance_epsilon for norm in norms}) == 1


@dataclass(frozen=True, slots=True)
class _Layer:
    """What a layer needs, looked up once.

    Attributes:
        project: to queries, keys and values, `[N, heads, d]`; norms: `[d]` weights of the first two's norms.
    """

    call: AttentionCall
    before: Tensor
    project: Callable[[Tensor], Sequence[Tensor]]
    norms: tuple[Tensor, Tensor] | None
    head_epsilon: float
    output: nn.Module
    after: Tensor
    mlp: Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class _Flat:
    layers: Sequence[_Layer]
    norm: Tensor
    epsilon: float

    def __call__(self, hidden: Tensor, rotation: Any, layout: Layout) -> Tensor:
        """`[N, D]` embeddings to last hidden states, `rotation` with the tokens' angles."""
        from groupwise.model.fast_gpu.norm_kernel import add_norm_rows
        from groupwise.model.fast_gpu.rotary_kernel import Angles, rotated

        angles = Angles(*rotation.angles)
        fresh: Tensor | None = None
        for layer in self.layers:
            whole = (hidden, None) if fresh is None else (fresh, hidden)
            hidden, normed = add_norm_rows(*whole, layer.before, self.epsilon)
            query, key, value = layer.project(normed)
            query, key = rotated(query, key, layer.norms, angles, layer.head_epsilon)
            attended = layer.output(layout.attend(layer.call, query, key, value).flatten(1))
            hidden, normed = add_norm_rows(attended, hidden, layer.after, self.epsilon)
            fresh = layer.mlp(normed)
        whole = (hidden, None) if fresh is None else (fresh, hidden)
        return add_norm_rows(*whole, self.norm, self.epsilon)[1]


def _projection(attention: Any) -> Callable[[Tensor], Sequence[Tensor]]:
    layers = [attention.q_proj, attention.k_proj, attention.v_proj]
    joined, size = joined_of(attention, layers), attention.head_dim

    def project(x: Tensor) -> Sequence[Tensor]:
        parts = [layer(x) for layer in layers] if joined is None else joined(x).split(joined.sizes, -1)
        return [part.unflatten(-1, (-1, size)) for part in parts]

    return project


def _mlp(mlp: Any) -> Callable[[Tensor], Tensor]:
    """A gated MLP, its first two products as one where their weights are; any other as the module that it is."""
    from groupwise.model.fast_gpu.gate_kernel import gated_rows

    layers = [getattr(mlp, name, None) for name in ("gate_proj", "up_proj")]
    joined = None if None in layers else joined_of(mlp, layers)  # type: ignore[arg-type]
    if joined is None:
        return mlp
    return lambda x: mlp.down_proj(gated_rows(*joined(x).split(joined.sizes, -1)))


def flat_on_gpu(decoder: Any) -> Callable[[Tensor, Any, Layout], Tensor]:
    """Of a decoder whose norms are `joinable`; good for one version of the weights, which stay where they are."""
    layers = [
        _Layer(
            call=layer.self_attn.call,
            before=layer.input_layernorm.weight,
            project=_projection(layer.self_attn),
            norms=weights_of(layer.self_attn.norms),
            head_epsilon=epsilon_of(layer.self_attn.norms),
            output=layer.self_attn.o_proj,
            after=layer.post_attention_layernorm.weight,
            mlp=_mlp(layer.mlp),
        )
        for layer in decoder.layers
    ]
    return _Flat(layers, decoder.norm.weight, decoder.norm.variance_epsilon)
