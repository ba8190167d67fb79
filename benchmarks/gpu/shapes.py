"""Models of true shapes with random weights, made in memory: what the benchmarks on one device run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from groupwise.config import LoraConfig
from groupwise.model.loading import LoadedModel, with_adapter, wrap_model


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The shape of a Qwen3.

    Attributes:
        tied: embedding and head are one matrix.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocab: int
    tied: bool = True

    @property
    def layer_weights(self) -> int:
        """Weights of the matrices in all layers: what every token is multiplied with, the head apart."""
        attention = self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.mlp)

    @property
    def weights(self) -> int:
        """Weights that every sampled token is multiplied with."""
        return self.layer_weights + self.head_weights

    @property
    def head_weights(self) -> int:
        return self.vocab * self.hidden

    def kv_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of one token's keys and values."""
        return 2 * self.layers * self.kv_heads * self.head_dim * dtype.itemsize


SHAPES = {
    "tiny": ModelShape(hidden=64, layers=2, heads=4, kv_heads=2, head_dim=32, mlp=128, vocab=512),
    "0.6b": ModelShape(hidden=1024, layers=28, heads=16, kv_heads=8, head_dim=128, mlp=3072, vocab=151_936),
    "1.7b": ModelShape(hidden=2048, layers=28, heads=16, kv_heads=8, head_dim=128, mlp=6144, vocab=151_936),
    "4b": ModelShape(hidden=2560, layers=36, heads=32, kv_heads=8, head_dim=128, mlp=9728, vocab=151_936),
    "8b": ModelShape(hidden=4096, layers=36, heads=32, kv_heads=8, head_dim=128, mlp=12_288, vocab=151_936, tied=False),
}


class NoTokenizer:
    """Stands where a tokenizer does: nothing here has a text, and no token ends a completion."""

    eos_token_id = None
    chat_template = None

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        return f"{len(token_ids)} tokens"


def hf_config(shape: ModelShape) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=shape.vocab, hidden_size=shape.hidden, intermediate_size=shape.mlp, head_dim=shape.head_dim,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        tie_word_embeddings=shape.tied, bos_token_id=None, eos_token_id=None, pad_token_id=None,
        architectures=["Qwen3ForCausalLM"],
    )  # fmt: skip


def build_model(
    shape: ModelShape, device: torch.device, dtype: torch.dtype, *, batch_invariant: bool = False, lora_rank: int = 0
) -> LoadedModel:
    torch.manual_seed(0)
    with torch.device(device):
        model: PreTrainedModel = Qwen3ForCausalLM._from_config(hf_config(shape), dtype=dtype)
    loaded = wrap_model(model, cast(Any, NoTokenizer()), batch_invariant=batch_invariant)
    return with_adapter(loaded, LoraConfig(rank=lora_rank))  # type: ignore[call-arg]
