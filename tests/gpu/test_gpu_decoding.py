"""Decoding on a GPU by graphs that draw: the tokens of the steps that the host draws for, whatever comes and goes."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
import torch

from groupwise.config import RolloutConfig
from groupwise.engines.native import NativeEngine
from groupwise.inputs import ModelInput
from groupwise.model.invariant.checked_product import forbid_split_sums, library_serves
from groupwise.model.invariant.linear import InvariantLinear
from groupwise.types import Completion, Prompt, SampleRequest, SamplingParams

from .test_gpu_batch_invariant import load

pytestmark = [pytest.mark.gpu, pytest.mark.extras(package="triton")]


def make_requests(sampling: list[SamplingParams]) -> list[SampleRequest]:
    generator = torch.Generator().manual_seed(1)
    prompts = [
        Prompt(
            uid=f"p{length}",
            messages=(),
            text="",
            input=ModelInput.of(tuple(torch.randint(3, 4000, (length,), generator=generator).tolist())),
        )
        for length in (1, 64, 130, 300)
    ]
    return [SampleRequest.of(prompt, i, params) for prompt in prompts for i, params in enumerate(sampling)]


def collect(engine: NativeEngine, requests: list[SampleRequest]) -> dict[str, Completion]:
    async def run() -> dict[str, Completion]:
        return {completion.request_id: completion async for completion in engine.generate(requests)}

    return asyncio.run(run())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "f32"])
@pytest.mark.parametrize("most", [7, 256])
def test_graphs_that_draw_give_what_the_host_draws(dtype: torch.dtype, most: int) -> None:
    loaded = replace(load(dtype, None, 0), stop_token_ids=tuple(range(0, 4000, 50)))
    requests = make_requests([SamplingParams(max_tokens=n, temperature=t) for n, t in ((5, 1.0), (64, 0.7), (200, 0))])
    config = RolloutConfig(kv_cache_gib=1, max_concurrent_samples=most)  # type: ignore[call-arg]
    by_host = NativeEngine(loaded, config)
    by_host._steps._ahead = None
    wanted = collect(by_host, requests)
    engine = NativeEngine(loaded, config)
    assert collect(engine, requests) == wanted
    assert {completion.finish_reason for completion in wanted.values()} == {"stop", "length"}
    filtered = make_requests([SamplingParams(max_tokens=20, top_k=5), SamplingParams(max_tokens=90)])
    assert collect(engine, filtered) == collect(by_host, filtered)
    assert collect(engine, requests) == wanted
    told = collect(engine, [replace(request, likeliest=n % 3) for n, request in enumerate(requests)])
    assert {name: replace(completion, likeliest=()) for name, completion in told.items()} == wanted


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "f32"])
def test_sampler_and_trainer_are_close_without_batch_invariance(dtype: torch.dtype) -> None:
    """The default forward: other kernels on the two sides, the same numbers up to rounding."""
    from groupwise.batches import TrainingRow
    from groupwise.model.forward.packing import pack

    loaded = load(dtype, None, 0, batch_invariant=False)
    assert not loaded.batch_invariant
    requests = make_requests([SamplingParams(max_tokens=n) for n in (5, 64, 65, 200)])
    engine = NativeEngine(loaded, RolloutConfig(kv_cache_gib=1))  # type: ignore[call-arg]
    found = collect(engine, requests)
    rows = [
        TrainingRow(i // 4, r.prompt, ModelInput.of(found[r.id].token_ids), *[(0.0,) * len(found[r.id].token_ids)] * 3)  # pyright: ignore[reportArgumentType]
        for i, r in enumerate(requests)
    ]
    scores = loaded.scoring(pack(rows).to(loaded.device)).logprobs.detach().cpu()
    sampled = torch.tensor([x for r in requests for x in found[r.id].logprobs])
    gap = (scores - sampled).abs()
    print("mean and largest difference", float(gap.mean()), float(gap.max()))
    assert float(gap.mean()) < (1e-5 if dtype == torch.float32 else 0.05)


@pytest.mark.parametrize(("n", "k"), [(4096, 1024), (1024, 3072), (6144, 1024), (1024, 2048), (12, 512), (4003, 520)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_products_have_the_same_bits_in_any_company(n: int, k: int, has_bias: bool) -> None:
    forbid_split_sums()
    generator = torch.Generator("cuda").manual_seed(3)
    layer = torch.nn.Linear(k, n, bias=has_bias, device="cuda", dtype=torch.bfloat16).requires_grad_(False)
    layer.__class__ = InvariantLinear
    x = torch.randn(20_000, k, device="cuda", generator=generator).to(torch.bfloat16)
    whole = layer(x)
    wanted = torch.nn.functional.linear(x[:300].double(), layer.weight.double())
    torch.testing.assert_close(
        whole[:300].double(), wanted + (layer.bias.double() if has_bias else 0.0), rtol=2**-7, atol=0.02
    )
    for first, count in ((0, 1), (3, 2), (100, 333), (19_999, 1), (5000, 700), (1, 17_000)):
        assert torch.equal(layer(x[first : first + count]), whole[first : first + count])
    assert layer(x[None, :7]).shape == (1, 7, n)
    print(f"{n} x {k}: the library serves: {library_serves(layer.weight, layer.bias)}")
