"""Mixtures of experts in the engine: the trainer's log-probs to the bit, one sample per key in any company."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from groupwise.model.loading import wrap_model
from groupwise.types import SamplingParams

Lab = Any
MakeMixture = Callable[..., PreTrainedModel]
FAMILIES = ("qwen3_moe", "mixtral", "glm4_moe", "olmoe", "qwen2_moe", "granitemoe")


@pytest.fixture(params=[1, pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.usefixtures("threads")
def test_batches_of_1_7_and_64_have_the_trainers_log_probs(
    lab: Lab, make_mixture: MakeMixture, family: str, dtype: torch.dtype
) -> None:
    loaded = replace(wrap_model(make_mixture(family, dtype=dtype), lab.tokenizer), stop_token_ids=())
    requests = lab.requests(
        [lab.prompt("a", 30), lab.prompt("b", 3)], [SamplingParams(max_tokens=n) for n in (7, 4, 6, 5)]
    )
    found = [lab.run(lab.engine(loaded, max_concurrent_samples=most), requests) for most in (64, 7, 1)]
    assert found[0] == found[1] == found[2]
    lab.assert_no_mismatch(loaded, requests, found[0])


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe", "glm4_moe"])
@pytest.mark.usefixtures("threads")
def test_no_mismatch_where_sums_are_deep_and_threads_share_a_layer_out(
    lab: Lab, make_mixture: MakeMixture, family: str
) -> None:
    """From a depth of 768 on torch's own products of float32 depend on the number of rows."""
    model = make_mixture(family, hidden_size=1024, head_dim=16, moe_intermediate_size=132, num_hidden_layers=2)
    loaded = replace(wrap_model(model, lab.tokenizer), stop_token_ids=())
    prompts = [lab.prompt("a", 300), lab.prompt("b", 3)]
    requests = lab.requests(prompts, [SamplingParams(max_tokens=n) for n in (3, 4, 2)])
    found = lab.run(lab.engine(loaded), requests)
    lab.assert_no_mismatch(loaded, requests, found)
