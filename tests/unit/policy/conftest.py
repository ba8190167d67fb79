"""A model small enough that a test of the real forward and backward takes milliseconds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from groupwise.model.loading import LoadedModel, wrap_model
from groupwise.quickstart.tiny_model import build_tokenizer

MakeModel = Callable[..., LoadedModel]


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer(["one two three"], 259)


@pytest.fixture
def make_model(tiny_tokenizer: PreTrainedTokenizerFast) -> MakeModel:
    """`make_model(dtype=…, tied=…, seed=…)` gives a fresh two-layer Qwen3 of width 32."""

    def make(dtype: torch.dtype = torch.float32, *, tied: bool = True, seed: int = 0) -> LoadedModel:
        return tiny_model(tiny_tokenizer, dtype, tied=tied, seed=seed)

    return make


def tiny_model(tokenizer: PreTrainedTokenizerFast, dtype: torch.dtype, *, tied: bool, seed: int) -> LoadedModel:
    config = Qwen3Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        initializer_range=0.2,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config)
    if dtype == torch.float64:
        widen_norms(model)
    return wrap_model(model.to(dtype), tokenizer)  # type: ignore[arg-type]


class WideNorm(nn.Module):
    """Qwen3's norm without its detour through float32, so that a float64 model is float64 throughout."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight = norm.weight
        self.epsilon = norm.variance_epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.epsilon)


def widen_norms(module: nn.Module) -> None:
    for name, child in module.named_children():
        if type(child).__name__ == "Qwen3RMSNorm":
            setattr(module, name, WideNorm(child))
        else:
            widen_norms(child)
