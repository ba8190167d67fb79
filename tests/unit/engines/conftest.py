"""Tiny models behind the native engine, and the trainer's forward to hold its log-probs against."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from groupwise.batches import TrainingRow
from groupwise.config import RolloutConfig
from groupwise.engines.native import NativeEngine
from groupwise.inputs import ModelInput
from groupwise.model.forward.head import token_scores
from groupwise.model.forward.hidden_states import packed_hidden_states
from groupwise.model.forward.packing import pack
from groupwise.model.loading import LoadedModel, wrap_model
from groupwise.quickstart.tiny_model import build_tokenizer
from groupwise.types import Completion, Prompt, SampleRequest, SamplingParams

CLASSES = {
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
    "gemma3": (Gemma3TextConfig, Gemma3ForCausalLM),
}
VOCABULARY = 283  # more than the tokenizer has, and no multiple of anything


@dataclass(frozen=True)
class Lab:
    """Builds models, engines and requests, and runs them."""

    tokenizer: PreTrainedTokenizerFast

    def model(
        self, name: str = "qwen3", *, dtype: torch.dtype = torch.float32, seed: int = 0, **settings: object
    ) -> LoadedModel:
        shape: dict[str, object] = {
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "intermediate_size": 92,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "initializer_range": 0.12,
            "tie_word_embeddings": True,
            "bos_token_id": None,
            "eos_token_id": 2,
            "pad_token_id": 0,
        }
        if name == "gemma3":
            kinds = ["sliding_attention", "full_attention", "sliding_attention"]
            shape |= {"num_hidden_layers": 3, "layer_types": kinds, "sliding_window": 21, "query_pre_attn_scalar": 16}
        config_class, model_class = CLASSES[name]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = model_class(config_class(**(shape | settings)))
        return wrap_model(model.to(dtype), self.tokenizer)  # pyright: ignore[reportArgumentType]

    def engine(self, loaded: LoadedModel, **settings: object) -> NativeEngine:
        return NativeEngine(loaded, RolloutConfig(**settings))  # type: ignore[arg-type]

    def prompt(self, name: str, length: int) -> Prompt:
        generator = torch.Generator().manual_seed(sum(name.encode()) + 1000 * length)
        tokens = tuple(torch.randint(3, 250, (length,), generator=generator).tolist())
        return Prompt(uid=name, messages=(), text="", input=ModelInput.of(tokens))

    def requests(
        self, prompts: Iterable[Prompt], sampling: Sequence[SamplingParams], version: int = 0
    ) -> list[SampleRequest]:
        """One sample per prompt and entry of `sampling`."""
        return [SampleRequest.of(p, i, s, version) for p in prompts for i, s in enumerate(sampling)]

    def run(self, engine: NativeEngine, requests: Sequence[SampleRequest]) -> dict[str, Completion]:
        return asyncio.run(self.collect(engine, requests))

    async def collect(self, engine: NativeEngine, requests: Sequence[SampleRequest]) -> dict[str, Completion]:
        found = [completion async for completion in engine.generate(requests)]
        assert len({c.request_id for c in found}) == len(found) == len(requests)
        return {c.request_id: c for c in found}

    def recomputed(
        self, loaded: LoadedModel, requests: Sequence[SampleRequest], completions: dict[str, Completion]
    ) -> dict[str, Tensor]:
        """The trainer's log-probs `[T]` by request: samples of one temperature in one packed forward."""
        found: dict[str, Tensor] = {}
        for temperature in {request.sampling.temperature for request in requests}:
            chosen = [r for r in requests if r.sampling.temperature == temperature]
            names = list(dict.fromkeys(r.key.uid for r in chosen))
            chosen.sort(key=lambda r: names.index(r.key.uid))
            rows = [row_of(names.index(r.key.uid), r.prompt, completions[r.id].token_ids) for r in chosen]
            packed = pack(rows)
            hidden = packed_hidden_states(loaded.model, packed)[packed.predictors]
            scores = token_scores(loaded.head, hidden, packed.targets, temperature=temperature)
            parts = scores.logprobs.detach().split([len(row.token_ids) for row in rows])
            found |= {r.id: part for r, part in zip(chosen, parts, strict=True)}
        return found

    def assert_no_mismatch(
        self, loaded: LoadedModel, requests: Sequence[SampleRequest], completions: dict[str, Completion]
    ) -> None:
        for name, wanted in self.recomputed(loaded, requests, completions).items():
            drift = (torch.tensor(completions[name].logprobs) - wanted).abs()
            assert float(drift.max()) == 0.0, f"{name}: {drift.tolist()}"


def row_of(group: int, prompt: ModelInput, tokens: Sequence[int]) -> TrainingRow:
    neutral = (0.0,) * len(tokens)
    return TrainingRow(group, prompt, ModelInput.of(tokens), (1,) * len(tokens), neutral, neutral)


@pytest.fixture(scope="session")
def lab() -> Lab:
    return Lab(build_tokenizer(["one two three, four five six"], 270))


@pytest.fixture(params=list(CLASSES))
def architecture(request: pytest.FixtureRequest) -> str:
    return request.param
