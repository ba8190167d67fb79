"""Whole models with the fused layers of a GPU, on a CPU by Triton's interpreter: training, sampling, and both alike."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from groupwise.config import LoraConfig, RolloutConfig
from groupwise.engines.native import NativeEngine
from groupwise.engines.native.ahead import StepsAhead
from groupwise.model.fast_cpu.lean_layers import join_products
from groupwise.model.fast_cpu.linear import DnnLinear
from groupwise.model.fast_gpu import layers
from groupwise.model.fast_gpu.flat import _Flat
from groupwise.model.fast_gpu.joined import Joined
from groupwise.model.forward.packing import pack_sequences
from groupwise.model.loading import LoadedModel, with_adapter, wrap_model
from groupwise.types import Completion, SampleRequest

from .test_interpreted_model import mismatch, requests_of

MakeModel = Callable[..., PreTrainedModel]
NAMES = ("qwen3", "qwen2", "llama")


@pytest.fixture
def load(make_model: MakeModel, tiny_tokenizer: PreTrainedTokenizerFast) -> Callable[..., LoadedModel]:
    def make(name: str, *, invariant: bool = True, **settings: object) -> LoadedModel:
        model = make_model(name, initializer_range=0.12, **settings)
        return wrap_model(model, tiny_tokenizer, batch_invariant=invariant)  # type: ignore[arg-type]

    return make


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "_is_on_gpu", lambda x: True)


def sample(loaded: LoadedModel, requests: Sequence[SampleRequest]) -> list[Completion]:
    """By steps that draw themselves."""
    engine = NativeEngine(loaded, RolloutConfig(max_concurrent_samples=5))  # type: ignore[call-arg]
    scheduler = engine._scheduler
    scheduler.shape = replace(scheduler.shape, fixed=True, graphs=True, by_kernel=True)
    scheduler.drop_caches()
    engine._steps._ahead = StepsAhead(loaded, scheduler)

    async def collect() -> dict[str, Completion]:
        return {completion.request_id: completion async for completion in engine.generate(requests)}

    found = asyncio.run(collect())
    return [found[request.id] for request in requests]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("as_on_a_gpu")
def test_no_mismatch(
    name: str, dtype: torch.dtype, load: Callable[..., LoadedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load(name, dtype=dtype)
    calls: list[int] = []
    flat = _Flat.__call__
    monkeypatch.setattr(_Flat, "__call__", lambda self, *a: (calls.append(1), flat(self, *a))[1])
    requests = requests_of((1, 40), (3, 12), temperature=0.8)
    found = sample(loaded, requests)
    assert calls, "the decode steps did not take the fused layers"
    assert mismatch(loaded, requests, found, temperature=0.8) == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.usefixtures("as_on_a_gpu")
def test_the_likeliest_tokens_have_the_trainers_log_probs(dtype: torch.dtype, load: Callable[..., LoadedModel]) -> None:
    """The host draws for a sample that wants them, and graphs for it do not."""
    loaded = load("qwen3", dtype=dtype)
    requests = requests_of((1, 40), (3, 5), temperature=0.8)
    plain = sample(loaded, requests)
    wanting = [replace(request, likeliest=2 * (number % 2)) for number, request in enumerate(requests)]
    found = sample(loaded, wanting)
    assert [replace(one, likeliest=()) for one in found] == plain
    asked, ended = list[SampleRequest](), list[Completion]()
    for request, one in zip(wanting, found, strict=True):
        assert len(one.likeliest) == (len(one.token_ids) if request.likeliest else 0)
        for place, told in enumerate(one.likeliest):
            for token, logprob in told:
                tokens, logprobs = (*one.token_ids[:place], token), (*one.logprobs[:place], logprob)
                asked.append(request)
                ended.append(replace(one, token_ids=tokens, logprobs=logprobs))
    assert mismatch(loaded, asked, ended, temperature=0.8) == 0.0


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("name", NAMES)
def test_scores_and_gradients_are_those_of_the_modules(
    name: str, rank: int, load: Callable[..., LoadedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load(name, invariant=False, dtype=torch.float32)
    loaded = with_adapter(loaded, LoraConfig.model_validate({"rank": rank}))
    packed = pack_sequences([(tuple(range(3, 40)), ()), (tuple(range(9, 30)), (7, 8, 9))])
    packed = replace(packed, targets=torch.tensor([5, 9]))

    def run() -> tuple[torch.Tensor, list[torch.Tensor]]:
        scores = loaded.scoring(packed, temperature=0.7).logprobs
        trained = [p for p in loaded.model.parameters() if p.requires_grad]
        return scores.detach(), list(torch.autograd.grad(scores.sum(), trained, allow_unused=True))

    wanted = run()
    monkeypatch.setattr(layers, "_is_on_gpu", lambda x: True)
    found = run()
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-4, atol=1e-4)
    for mine, theirs in zip(found[1], wanted[1], strict=True):
        if theirs is not None:
            torch.testing.assert_close(mine, theirs, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("name", NAMES)
def test_joined_products_sample_what_the_trainer_scores(
    name: str, rank: int, load: Callable[..., LoadedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load(name, invariant=False, dtype=torch.float32)
    for module in loaded.model.modules():
        if type(module) is DnnLinear:  # a CPU's
            module.__class__ = torch.nn.Linear  # type: ignore[assignment]
    join_products(loaded.model)
    loaded = with_adapter(loaded, LoraConfig.model_validate({"rank": rank}))
    for parameter_name, parameter in loaded.model.named_parameters():
        if ".lora_B." in parameter_name:
            torch.nn.init.normal_(parameter, std=0.1)
    monkeypatch.setattr(layers, "_is_on_gpu", lambda x: True)
    calls: list[int] = []
    product = Joined.__call__
    monkeypatch.setattr(Joined, "__call__", lambda self, x: (calls.append(1), product(self, x))[1])
    requests = requests_of((1, 40), (3, 12), temperature=0.8)
    found = sample(loaded, requests)
    assert bool(calls) == (rank == 0), "adapters are not left out"
    assert mismatch(loaded, requests, found, temperature=0.8) < 1e-4
