"""Decoder layers of the Llama family in fewer operations: the same bits, less time and memory.

transformers' layers walk through many small operations, each with a node of its own in the gradient's graph. Here a
rotation (Su et al. 2021, "RoFormer", equation 34) and a gated activation (SwiGLU; Shazeer 2020, "GLU variants", eq. 6)
are one node each; while samples are drawn (`ordered_weights`) the layers are functions, see `flat_layers`. The module
tree, its names and its weights stay as they are; without one of our layouts the attention and the layers are
transformers' own.

Shapes: N tokens, H heads of size d, I the width between gate and down.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import silu
from transformers import PreTrainedModel
from transformers.activations import SiLUActivation
from transformers.modeling_outputs import BaseModelOutputWithPast

from groupwise.model.fast_cpu.evenly import EvenActivation
from groupwise.model.fast_cpu.flat_layers import FlatLayer, Function, flat_linear, flat_mlp, flat_norm, flat_projection
from groupwise.model.fast_cpu.linear import DnnLinear
from groupwise.model.fast_cpu.norms import LeanNorm
from groupwise.model.fast_gpu.flat import epsilon_of, flat_on_gpu, joinable, weights_of
from groupwise.model.fast_gpu.joined import join
from groupwise.model.fast_gpu.layers import add_norm, fused, turned
from groupwise.model.fast_gpu.layers import gated as gated_on_gpu
from groupwise.model.forward.attention import AttentionCall, Layout

# Where each architecture keeps an attention module's sliding window.
_WINDOWS: dict[str, Callable[[Any], int | None]] = {
    "LlamaDecoderLayer": lambda attention: None,
    "MistralDecoderLayer": lambda attention: attention.config.sliding_window,
    "Qwen2DecoderLayer": lambda attention: attention.sliding_window,
    "Qwen3DecoderLayer": lambda attention: attention.sliding_window,
}
LLAMA_LAYERS = frozenset(_WINDOWS)

Activation = Callable[[Tensor], Tensor]


class Rotation(tuple[Tensor, Tensor]):
    """Cosines and sines `[1, N, d]`, a pair as transformers unpacks it, and what `rotate` needs of them.

    Attributes:
        cos, turned: `[1, N, 1, d]`, the cosines, and the sines with those of the first half negated.
    """

    cos: Tensor
    turned: Tensor

    @staticmethod
    def of(cos: Tensor, sin: Tensor) -> Rotation:
        rotation = Rotation((cos, sin))
        half = sin.shape[-1] // 2
        rotation.cos = cos.unsqueeze(2)
        rotation.turned = torch.cat((-sin[..., :half], sin[..., half:]), -1).unsqueeze(2)
        return rotation

    @property
    def angles(self) -> tuple[Tensor, Tensor]:
        """`cos, turned` of the one sequence, `[N, d]`."""
        return self.cos[0, :, 0], self.turned[0, :, 0]


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """`x [1, N, H, d]`, each pair of elements half a head apart turned by its token's angles."""
    if torch.is_grad_enabled() and x.requires_grad:
        return _Rotate.apply(x, rotation.cos, rotation.turned)
    return _rotated(x, rotation.cos, rotation.turned)


def _rotated(x: Tensor, cos: Tensor, turned: Tensor) -> Tensor:
    return (x * cos).add_(x.roll(x.shape[-1] // 2, -1).mul_(turned))


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, turned: Tensor) -> Tensor:
        ctx.save_for_backward(cos, turned)
        return _rotated(x, cos, turned)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, turned = ctx.saved_tensors
        grad = grads[0]
        # The inverse rotation: both halves have the same angles, so rolling `turned` negates it.
        return (grad * cos).sub_(grad.roll(grad.shape[-1] // 2, -1).mul_(turned)), None, None


def gated(activation: Activation, gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, `[…, I]`.

    Args:
        activation: computes SiLU into memory of its own, in whatever way.
    """
    if fused(gate):
        return gated_on_gpu(gate, up)
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        return _Gated.apply(activation, gate, up)
    return activation(gate).mul_(up)


class _Gated(torch.autograd.Function):
    """Keeps its two inputs, and computes the activation again for the gradient."""

    @staticmethod
    def forward(ctx: Any, activation: Activation, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return activation(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        of_up = silu(gate).mul_(grads[0])
        of_gate = grads[0] * up
        torch.ops.aten.silu_backward.grad_input(of_gate, gate, grad_input=of_gate)
        return None, of_gate, of_up


class LeanMlp(nn.Module):
    """Laid over a gated MLP whose activation is SiLU; see `make_layers_lean`."""

    def forward(self, x: Tensor) -> Tensor:
        parts = cast(Any, self)
        return parts.down_proj(gated(parts.act_fn, parts.gate_proj(x), parts.up_proj(x)))


class LeanAttention(nn.Module):
    """Laid over the attention module of an architecture in `LLAMA_LAYERS`."""

    window_of: Callable[[Any], int | None]

    def forward(self, hidden_states: Tensor, position_embeddings: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        layout: Layout | None = kwargs.get("layout")
        if layout is None:
            kwargs.setdefault("attention_mask", None)
            return super().forward(hidden_states, position_embeddings, **kwargs)  # pyright: ignore
        parts = cast(Any, self)
        query, key, value = self._project(hidden_states, position_embeddings)
        out = layout.attend(self.call, query[0], key[0], value[0])
        return parts.o_proj(out.flatten(1)[None]), None

    def _project(self, x: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        """Queries `[1, N, Hq, d]`, keys and values `[1, N, Hkv, d]`."""
        parts = cast(Any, self)
        size = parts.head_dim
        query, key, value = (
            projection(x).unflatten(-1, (-1, size)) for projection in (parts.q_proj, parts.k_proj, parts.v_proj)
        )
        norms = self.norms
        if fused(query) and all(isinstance(norm, LeanNorm) for norm in norms):
            found = turned(query[0], key[0], weights_of(norms), *rotation.angles, epsilon_of(norms))
            return found[0][None], found[1][None], value
        if norms:
            query, key = parts.q_norm(query), parts.k_norm(key)
        return rotate(query, rotation), rotate(key, rotation), value

    @property
    def norms(self) -> Sequence[nn.Module]:
        """Of queries and keys; none in some architectures."""
        return [self._modules[name] for name in ("q_norm", "k_norm") if name in self._modules]  # pyright: ignore

    @property
    def call(self) -> AttentionCall:
        parts = cast(Any, self)
        return AttentionCall(parts.layer_idx, parts.scaling, type(self).window_of(self))


class LeanLayer(nn.Module):
    """Laid over a decoder layer of an architecture in `LLAMA_LAYERS`."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Any:
        if kwargs.get("layout") is None:
            return super().forward(hidden_states, **kwargs)  # pyright: ignore
        parts = cast(Any, self)
        attended, _ = parts.self_attn(parts.input_layernorm(hidden_states), **kwargs)
        norm = parts.post_attention_layernorm
        if fused(attended) and isinstance(norm, LeanNorm):
            hidden, normed = add_norm(attended, hidden_states, norm.weight, norm.variance_epsilon)
            return _added(parts.mlp(normed), hidden)
        hidden = _added(attended, hidden_states)
        return _added(parts.mlp(norm(hidden)), hidden)


def _added(fresh: Tensor, residual: Tensor) -> Tensor:
    """Their sum; where no gradient remembers it, in the place of `fresh`."""
    return residual + fresh if torch.is_grad_enabled() else fresh.add_(residual)


class LeanRotary(nn.Module):
    """Laid over the module that makes cosines and sines."""

    def forward(self, x: Tensor, position_ids: Tensor) -> Rotation:
        return Rotation.of(*super().forward(x, position_ids))  # pyright: ignore


class LeanDecoder(nn.Module):
    """Laid over the module that holds embedding, layers and last norm."""

    flat: Callable[[Tensor, Rotation, Layout], Tensor] | None = None

    def forward(self, input_ids: Tensor | None = None, **kwargs: Any) -> Any:
        layout: Layout | None = kwargs.get("layout")
        if layout is None or input_ids is None:
            return super().forward(input_ids=input_ids, **kwargs)  # pyright: ignore
        parts = cast(Any, self)
        hidden = parts.embed_tokens(input_ids)
        rotation = parts.rotary_emb(hidden, kwargs["position_ids"])
        if self.flat is not None and not torch.is_grad_enabled():
            return BaseModelOutputWithPast(last_hidden_state=self.flat(hidden[0], rotation, layout)[None])
        for layer in parts.layers:
            hidden = layer(hidden, position_embeddings=rotation, layout=layout)
        return BaseModelOutputWithPast(last_hidden_state=parts.norm(hidden))

    def order(self) -> Sequence[nn.Module]:
        """Flat layers until `forget_order`, unless somebody watches a module's calls."""
        parts = cast(Any, self)
        if any(map(_is_watched, self.modules())):
            return []
        if fused(parts.embed_tokens.weight) and joinable(parts):
            self.flat = flat_on_gpu(parts)
            return []
        self.flat = _Flat([_flat(layer) for layer in parts.layers], flat_norm(parts.norm))
        return [linear for layer in parts.layers for linear in _linears(layer)]

    def forget_order(self) -> None:
        self.flat = None


@dataclass(frozen=True, slots=True)
class _Flat:
    layers: Sequence[FlatLayer]
    norm: Function

    def __call__(self, hidden: Tensor, rotation: Rotation, layout: Layout) -> Tensor:
        turn = partial(_rotated, cos=rotation.cos[0], turned=rotation.turned[0])
        for layer in self.layers:
            hidden = layer(hidden, turn, layout)
        return self.norm(hidden)


def _is_watched(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _linears(layer: Any) -> list[nn.Module]:
    """Those that a flat layer holds itself."""
    attention, mlp = layer.self_attn, layer.mlp
    found = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
    if isinstance(mlp, LeanMlp):
        found += [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    return [linear for linear in found if isinstance(linear, DnnLinear)]


def _flat(layer: Any) -> FlatLayer:
    attention = layer.self_attn
    return FlatLayer(
        call=attention.call,
        before=flat_norm(layer.input_layernorm),
        project=flat_projection(attention, attention.norms),
        output=flat_linear(attention.o_proj),
        after=flat_norm(layer.post_attention_layernorm),
        mlp=flat_mlp(layer.mlp) if isinstance(layer.mlp, LeanMlp) else layer.mlp,
    )


def make_layers_lean(model: PreTrainedModel) -> None:
    """Lay lean forwards over the decoder of a model, if its layers are of one kind that is known."""
    decoder: Any = model.get_decoder()
    layers: list[Any] = [module for module in decoder.modules() if type(module).__name__ in LLAMA_LAYERS]
    if len({type(layer) for layer in layers}) != 1:
        return
    window_of = _WINDOWS[type(layers[0]).__name__]
    lay(LeanDecoder, decoder)
    lay(LeanRotary, decoder.rotary_emb)
    for layer in layers:
        lay(LeanLayer, layer)
        lay(LeanAttention, layer.self_attn)
        type(layer.self_attn).window_of = window_of
        if is_silu(layer.mlp.act_fn):
            lay(LeanMlp, layer.mlp)


def join_products(model: PreTrainedModel) -> None:
    """Lay weights that a decode step multiplies with the same numbers side by side in memory, on a GPU."""
    for module in model.modules():
        if isinstance(module, LeanAttention):
            parts = cast(Any, module)
            join(module, [parts.q_proj, parts.k_proj, parts.v_proj])
        elif isinstance(module, LeanMlp):
            parts = cast(Any, module)
            join(module, [parts.gate_proj, parts.up_proj])


def is_silu(activation: nn.Module) -> bool:
    inner = activation.activation if isinstance(activation, EvenActivation) else activation
    return isinstance(inner, nn.SiLU | SiLUActivation)


def lay(lean: type[nn.Module], module: nn.Module) -> None:
    """Give `module` the methods of `lean`, and its own behind them."""
    own = type(module)
    module.__class__ = type(f"Lean{own.__name__}", (lean, own), {})
