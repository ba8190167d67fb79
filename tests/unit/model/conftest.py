"""Tiny random models of four architectures, hostile in size: nothing in them is a multiple of a vector's width."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from groupwise.batches import TrainingRow
from groupwise.inputs import ModelInput
from groupwise.quickstart.tiny_model import build_tokenizer

ARCHITECTURES = {
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
    "gemma3": (Gemma3TextConfig, Gemma3ForCausalLM),
}
VOCABULARY = 283
MakeModel = Callable[..., PreTrainedModel]
EagerLogits = Callable[..., Tensor]
MakeRows = Callable[..., list[TrainingRow]]


@pytest.fixture(params=list(ARCHITECTURES))
def architecture(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer(["one two three, four five six"], 270)


@pytest.fixture
def make_model() -> MakeModel:
    """`make_model("qwen3", dtype=…, seed=…, **settings)`: weights wide enough that distributions are not flat."""

    def make(name: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, **settings: object) -> PreTrainedModel:
        shape: dict[str, object] = {
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "intermediate_size": 92,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "initializer_range": 0.2,
            "tie_word_embeddings": True,
            "bos_token_id": None,
            "eos_token_id": 2,
            "pad_token_id": 0,
        }
        if name == "gemma3":
            kinds = ["sliding_attention", "full_attention", "sliding_attention"]
            shape |= {"num_hidden_layers": 3, "layer_types": kinds, "sliding_window": 21, "query_pre_attn_scalar": 16}
        config_class, model_class = ARCHITECTURES[name]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = model_class(config_class(**(shape | settings)))
        if dtype == torch.float64:
            _widen_norms(model)
        return model.to(dtype).eval()

    return make


class _Norm64(nn.Module):
    """RMSNorm in the type that comes: transformers' own rounds to float32, which no test of 1e-9 survives."""

    def __init__(self, weight: nn.Parameter, offset: float, eps: float) -> None:
        super().__init__()
        self.weight, self.offset, self.eps = weight, offset, eps

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * (self.offset + self.weight)


def _widen_norms(model: PreTrainedModel) -> None:
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child).__name__.endswith("RMSNorm"):
                offset = 1.0 if type(child).__name__.startswith("Gemma3") else 0.0
                module.register_module(name, _Norm64(child.weight, offset, 1e-6))  # pyright: ignore[reportArgumentType]


@pytest.fixture
def eager() -> Callable[[PreTrainedModel], PreTrainedModel]:
    """A copy that runs transformers' own attention: eager, or in float64 the one that does not round to float32."""

    def make(model: PreTrainedModel) -> PreTrainedModel:
        twin = copy.deepcopy(model)
        twin.set_attn_implementation("sdpa" if model.dtype == torch.float64 else "eager")
        return twin

    return make


@pytest.fixture
def make_rows() -> MakeRows:
    """`make_rows([(prompt length, [completion lengths]), …], seed=…)`, one group per entry."""

    def make(shape: list[tuple[int, list[int]]], *, seed: int = 0) -> list[TrainingRow]:
        generator = torch.Generator().manual_seed(seed)

        def tokens(count: int) -> tuple[int, ...]:
            return tuple(torch.randint(0, VOCABULARY, (count,), generator=generator).tolist())

        rows: list[TrainingRow] = []
        for group, (prompt_length, lengths) in enumerate(shape):
            prompt = tokens(prompt_length)
            rows.extend(
                TrainingRow(group, ModelInput.of(prompt), ModelInput.of(tokens(n)), (1,) * n, (1.0,) * n, (0.0,) * n)
                for n in lengths
            )
        return rows

    return make
