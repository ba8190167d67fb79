"""`model.batch_invariant` on a GPU: decoding in graphs and the trainer's packed forward agree to the bit."""

from __future__ import annotations

import asyncio

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from groupwise.batches import TrainingRow
from groupwise.config import LoraConfig, RolloutConfig
from groupwise.engines.native import NativeEngine
from groupwise.inputs import ModelInput
from groupwise.model.forward.packing import pack
from groupwise.model.loading import LoadedModel, with_adapter, wrap_model
from groupwise.quickstart.tiny_model import build_tokenizer
from groupwise.types import Completion, Prompt, SampleRequest, SamplingParams

pytestmark = [pytest.mark.gpu, pytest.mark.extras(package="triton")]


def load(dtype: torch.dtype, window: int | None, rank: int, *, batch_invariant: bool = True) -> LoadedModel:
    kinds = ["sliding_attention" if window else "full_attention", "full_attention"]
    config = Qwen3Config(
        vocab_size=4003, hidden_size=512, intermediate_size=1100, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=4, head_dim=64, initializer_range=0.08, bos_token_id=None, eos_token_id=None,
        pad_token_id=None, layer_types=kinds, use_sliding_window=bool(window), sliding_window=window,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config).to("cuda", dtype)  # pyright: ignore[reportArgumentType]
    loaded = wrap_model(model, build_tokenizer(["one two"], 270), batch_invariant=batch_invariant)  # type: ignore[arg-type]
    loaded = with_adapter(loaded, LoraConfig.model_validate({"rank": rank}))
    for name, parameter in loaded.model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return loaded


def sample(loaded: LoadedModel, requests: list[SampleRequest]) -> list[Completion]:
    engine = NativeEngine(loaded, RolloutConfig(kv_cache_gib=1))  # type: ignore[call-arg]

    async def collect() -> dict[str, Completion]:
        return {completion.request_id: completion async for completion in engine.generate(requests)}

    found = asyncio.run(collect())
    return [found[request.id] for request in requests]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "f32"])
@pytest.mark.parametrize(("window", "rank"), [(None, 0), (70, 0), (None, 12)])
def test_no_mismatch(dtype: torch.dtype, window: int | None, rank: int) -> None:
    loaded = load(dtype, window, rank)
    generator = torch.Generator().manual_seed(1)
    requests: list[SampleRequest] = []
    for length in (1, 64, 130, 300):
        tokens = tuple(torch.randint(3, 4000, (length,), generator=generator).tolist())
        prompt = Prompt(uid=f"p{length}", messages=(), text="", input=ModelInput.of(tokens))
        params = [SamplingParams(max_tokens=n, temperature=0.8) for n in (5, 64, 65, 200)]
        requests += [SampleRequest.of(prompt, i, param) for i, param in enumerate(params)]
    found = sample(loaded, requests)
    rows = [
        TrainingRow(i // 4, r.prompt, ModelInput.of(c.token_ids), *[(0.0,) * len(c.token_ids)] * 3)  # pyright: ignore[reportArgumentType]
        for i, (r, c) in enumerate(zip(requests, found, strict=True))
    ]
    scores = loaded.scoring(pack(rows).to(loaded.device), temperature=0.8)
    sampled = torch.tensor([x for completion in found for x in completion.logprobs], device=loaded.device)
    assert torch.equal(scores.logprobs.detach(), sampled)
    assert sample(loaded, requests[6:7]) == found[6:7]

    scores.logprobs.sum().backward()
    grads = [p.grad for p in loaded.model.parameters() if p.requires_grad]
    assert all(grad is not None and bool(grad.isfinite().all()) for grad in grads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "f32"])
def test_kernels_on_the_device(dtype: torch.dtype) -> None:
    """Values against float64, and the same bits for a row in any company."""
    from groupwise.model.fast_gpu.norm_kernel import add_norm_rows
    from groupwise.model.invariant.matmul_kernel import product
    from groupwise.model.invariant.rows_kernel import sum_rows

    torch.manual_seed(0)
    tolerance = 1e-4 if dtype == torch.float32 else 2**-7
    for n, k in ((1024, 3072), (12, 512), (4003, 520)):
        x = torch.randn(700, k, device="cuda", dtype=dtype)
        weight = torch.randn(n, k, device="cuda", dtype=dtype) / k**0.5
        whole = product(x, weight, None)
        torch.testing.assert_close(whole.double(), x.double() @ weight.double().t(), rtol=tolerance, atol=tolerance)
        for rows in (slice(0, 1), slice(3, 5), slice(100, 433)):
            assert torch.equal(product(x[rows], weight, None), whole[rows])
            for unit_offset in (False, True):
                norms = [
                    add_norm_rows(some, None, weight[0], 1e-6, unit_offset=unit_offset)[1] for some in (x[rows], x)
                ]
                assert torch.equal(norms[0], norms[1][rows])
    x = torch.rand(70, 151_936, device="cuda")
    torch.testing.assert_close(sum_rows(x).double(), x.double().sum(-1), rtol=1e-5, atol=0)
    assert torch.equal(sum_rows(x[5:6]), sum_rows(x)[5:6])
