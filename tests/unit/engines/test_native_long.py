"""Answers and prompts that cross the boundaries of attention's blocks, where those are small and where they grow."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from groupwise.types import SamplingParams

Lab = Any

LENGTHS = (1, 63, 64, 65, 255, 256, 257, 511, 512, 513, 1100)


def asked(lengths: tuple[int, ...]) -> list[SamplingParams]:
    return [SamplingParams(max_tokens=n, min_tokens=n) for n in lengths]


@pytest.mark.parametrize(
    ("name", "settings", "dtype"),
    [
        ("qwen3", {}, torch.float32),
        ("qwen3", {}, torch.bfloat16),
        pytest.param(
            "qwen3",
            {"head_dim": 128, "num_attention_heads": 2, "num_key_value_heads": 2},
            torch.float32,
            marks=pytest.mark.slow,
        ),
        pytest.param("gemma3", {"sliding_window": 300}, torch.float32, marks=pytest.mark.slow),
        pytest.param("gemma3", {"sliding_window": 21}, torch.bfloat16, marks=pytest.mark.slow),
    ],
    ids=["f32", "bf16", "heads-of-128-unshared", "window-of-300", "window-of-21-bf16"],
)
def test_answers_of_any_length_have_no_mismatch(lab: Lab, name: str, settings: Any, dtype: torch.dtype) -> None:
    loaded = replace(lab.model(name, dtype=dtype, **settings), stop_token_ids=())
    requests = lab.requests([lab.prompt("a", 30)], asked(LENGTHS))
    found = lab.run(lab.engine(loaded), requests)
    assert sorted(len(one.token_ids) for one in found.values()) == list(LENGTHS)
    lab.assert_no_mismatch(loaded, requests, found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_prompts_of_any_length_have_no_mismatch(lab: Lab, dtype: torch.dtype) -> None:
    """One to three samples of each, of one to seven tokens: few query rows meet many keys."""
    loaded = replace(lab.model(dtype=dtype, head_dim=128), stop_token_ids=())
    requests = [
        request
        for number, length in enumerate(LENGTHS)
        for request in lab.requests([lab.prompt(f"p{length}", length)], asked((2, 7, 1)[: 1 + number % 3]))
    ]
    found = lab.run(lab.engine(loaded), requests)
    lab.assert_no_mismatch(loaded, requests, found)


@pytest.mark.slow
def test_a_long_answer_is_the_same_bits_in_any_company(lab: Lab) -> None:
    """Alone, beside shorter ones, and beside others of its length, whose caches grow at other times."""
    loaded = replace(lab.model(), stop_token_ids=())
    prompts = [lab.prompt("a", 70), lab.prompt("b", 300)]
    requests = lab.requests(prompts, asked((20, 260, 530, 600)))
    wanted = lab.run(lab.engine(loaded), requests)
    for most in (1, 3):
        assert lab.run(lab.engine(loaded, max_concurrent_samples=most), requests) == wanted, most
    assert lab.run(lab.engine(loaded), requests[3:4]) == {requests[3].id: wanted[requests[3].id]}
