"""One attention function for every Hugging Face module: it hands queries, keys and values to the layout of the pass.

A layout knows which token sees which: `PackedLayout` for training and prefill (`packed_attention.py`), the
engine's decode layout for generation. It travels to the attention modules as the keyword argument `layout` of the
model's forward. Shapes inside: queries `[N, Hq, d]`, keys and values `[N, Hkv, d]`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import AttentionInterface

ATTENTION_NAME = "groupwise"


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """What one attention module asks: its layer, the factor on the scores, and its sliding window in tokens, if any."""

    layer: int
    scale: float
    window: int | None


class Layout(Protocol):
    """Decides which token sees which."""

    def attend(self, call: AttentionCall, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention output `[N, Hq, d]`; the next call may write over it."""
        ...


def _attention(  # noqa: PLR0913 - the signature is transformers'
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    layout: Layout,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The function registered with transformers: `[1, H, N, d]` in, `[1, N, H, d]` out."""
    layer = module.layer_idx
    assert isinstance(layer, int), "an attention module without layer_idx"
    assert softcap is None and s_aux is None, "capped scores and attention sinks are refused when a model is loaded"
    call = AttentionCall(layer, scaling if scaling is not None else query.shape[-1] ** -0.5, sliding_window)
    out = layout.attend(call, query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1))
    return out.unsqueeze(0), None


AttentionInterface.register(ATTENTION_NAME, _attention)
