"""Whole models with `model.batch_invariant`, on a CPU by Triton's interpreter: sampler and trainer agree to the bit."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from groupwise.batches import TrainingRow
from groupwise.config import LoraConfig, RolloutConfig
from groupwise.engines.native import NativeEngine
from groupwise.errors import ConfigError
from groupwise.inputs import ModelInput
from groupwise.model.forward.packing import pack
from groupwise.model.loading import LoadedModel, with_adapter, wrap_model
from groupwise.types import Completion, Prompt, SampleRequest, SamplingParams

MakeModel = Callable[..., PreTrainedModel]
MakeRows = Callable[..., list[TrainingRow]]


def prompt(length: int) -> Prompt:
    tokens = torch.randint(3, 250, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    return Prompt(uid=f"p{length}", messages=(), text="", input=ModelInput.of(tokens))


def requests_of(lengths: Sequence[int], tokens: Sequence[int], temperature: float = 1.0) -> list[SampleRequest]:
    return [
        SampleRequest.of(prompt(length), i, SamplingParams(max_tokens=count, temperature=temperature))
        for length in lengths
        for i, count in enumerate(tokens)
    ]


def sample(loaded: LoadedModel, requests: Sequence[SampleRequest], *, as_on_a_gpu: bool = False) -> list[Completion]:
    engine = NativeEngine(loaded, RolloutConfig())  # type: ignore[call-arg]
    if as_on_a_gpu:  # lanes, prompts and lengths rounded up
        engine._scheduler.shape = replace(engine._scheduler.shape, graphs=True)

    async def collect() -> dict[str, Completion]:
        return {completion.request_id: completion async for completion in engine.generate(requests)}

    found = asyncio.run(collect())
    return [found[request.id] for request in requests]


def mismatch(
    loaded: LoadedModel, requests: Sequence[SampleRequest], found: Sequence[Completion], temperature: float = 1.0
) -> float:
    names = list(dict.fromkeys(request.key.uid for request in requests))
    rows = [
        TrainingRow(
            names.index(r.key.uid),
            r.prompt,
            ModelInput.of(c.token_ids),
            *[(0.0,) * len(c.token_ids)] * 3,  # pyright: ignore[reportArgumentType]
        )
        for r, c in zip(requests, found, strict=True)
    ]
    sampled = torch.tensor([x for completion in found for x in completion.logprobs])
    assert len(sampled) > 20
    assert sampled.std() > 0.1, "equal log-probs would prove little"
    scores = loaded.scoring(pack(rows), temperature=temperature)
    assert scores.logprobs.requires_grad
    return float((scores.logprobs.detach() - sampled).abs().max())


@pytest.fixture
def load(make_model: MakeModel, tiny_tokenizer: PreTrainedTokenizerFast) -> Callable[..., LoadedModel]:
    def make(name: str, **settings: object) -> LoadedModel:
        loaded = wrap_model(make_model(name, **settings), tiny_tokenizer, batch_invariant=True)  # type: ignore[arg-type]
        assert loaded.batch_invariant
        return loaded

    return make


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_no_mismatch(architecture: str, dtype: torch.dtype, load: Callable[..., LoadedModel]) -> None:
    loaded = load(architecture, dtype=dtype, initializer_range=0.12)
    requests = requests_of((1, 66), (3, 12))
    assert mismatch(loaded, requests, sample(loaded, requests)) == 0.0


def test_no_mismatch_across_blocks(load: Callable[..., LoadedModel]) -> None:
    loaded = replace(load("gemma3", initializer_range=0.12), stop_token_ids=())
    requests = requests_of((64,), (67,))
    assert mismatch(loaded, requests, sample(loaded, requests)) == 0.0


def test_no_mismatch_in_padded_lanes_at_another_temperature(load: Callable[..., LoadedModel]) -> None:
    loaded = replace(load("gemma3", initializer_range=0.12), stop_token_ids=())
    requests = requests_of((64, 5), (8, 4), temperature=0.7)
    found = sample(loaded, requests, as_on_a_gpu=True)
    assert mismatch(loaded, requests, found, 0.7) == 0.0
    assert sample(loaded, requests[2:3]) == found[2:3]


def test_no_mismatch_under_lora(load: Callable[..., LoadedModel]) -> None:
    loaded = with_adapter(load("qwen3", initializer_range=0.12), LoraConfig.model_validate({"rank": 3}))
    assert loaded.batch_invariant
    for name, parameter in loaded.model.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
    requests = requests_of((9, 30), (3, 12))
    assert mismatch(loaded, requests, sample(loaded, requests)) == 0.0


def test_scores_and_gradients_are_those_of_the_plain_model(
    architecture: str, make_model: MakeModel, make_rows: MakeRows, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    packed = pack(make_rows([(1, [1, 63]), (65, [66]), (5, [9])]))
    results: list[dict[str, Any]] = []
    for invariant in (False, True):
        model = make_model(architecture, initializer_range=0.1)
        loaded = wrap_model(model, tiny_tokenizer, batch_invariant=invariant)  # type: ignore[arg-type]
        scores = loaded.scoring(packed, temperature=0.8, with_entropy=True)
        assert scores.entropy is not None
        weight = torch.linspace(-1, 1, scores.logprobs.shape[0])
        ((scores.logprobs * weight).sum() + (scores.entropy * weight.flip(0)).sum()).backward()
        grads = {name: p.grad for name, p in model.named_parameters()}
        results.append({"logprobs": scores.logprobs, "entropy": scores.entropy} | grads)
    plain, mine = results
    assert plain.keys() == mine.keys()
    for name, wanted in plain.items():
        torch.testing.assert_close(mine[name], wanted, rtol=2e-3, atol=2e-3 * float(wanted.detach().abs().max()))


class NormWithoutWeights(nn.Module):
    """As some architectures have them."""


def test_other_parts_are_refused_by_name(make_model: MakeModel, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model = make_model("qwen3")
    model.get_decoder().norm = nn.LayerNorm(64)
    with pytest.raises(ConfigError, match="qwen3 computes with LayerNorm, for which there is no kernel"):
        wrap_model(model, tiny_tokenizer, batch_invariant=True)  # type: ignore[arg-type]
    model.get_decoder().norm = NormWithoutWeights()
    with pytest.raises(ConfigError, match="qwen3 computes with NormWithoutWeights"):
        wrap_model(model, tiny_tokenizer, batch_invariant=True)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"the model is torch\.float16; set model\.dtype"):
        wrap_model(make_model("qwen3", dtype=torch.float16), tiny_tokenizer, batch_invariant=True)  # type: ignore[arg-type]
    many = LlamaForCausalLM(
        LlamaConfig(hidden_size=528, num_attention_heads=33, num_key_value_heads=1, num_hidden_layers=1, vocab_size=9)
    )
    with pytest.raises(ConfigError, match="33 query heads to a key head"):
        wrap_model(many, tiny_tokenizer, batch_invariant=True)  # type: ignore[arg-type]
