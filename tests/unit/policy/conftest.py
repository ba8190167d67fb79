"""A model small enough that a test of the real forward and backward takes milliseconds."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from groupwise.model.loading import LoadedModel, wrap_model
from groupwise.quickstart.tiny_model import build_tokenizer

MakeModel = Callable[..., LoadedModel]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small gain nothing from threads, which make them slow on a machine that has other work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer(["one two three"], 259)


@pytest.fixture
def make_model(tiny_tokenizer: PreTrainedTokenizerFast) -> MakeModel:
    """`make_model(dtype=…, tied=…, seed=…)` gives a fresh two-layer Qwen3 of width 32."""

    def make(dtype: torch.dtype = torch.float32, *, tied: bool = True, seed: int = 0) -> LoadedModel:
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
        return wrap_model(model.to(dtype), tiny_tokenizer)  # type: ignore[arg-type]

    return make
