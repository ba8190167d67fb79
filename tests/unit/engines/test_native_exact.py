"""What the engine promises of numbers: transformers' tokens, the trainer's log-probs, one sample per key."""

from __future__ import annotations

import asyncio
import copy
import math
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from groupwise.inputs import ModelInput
from groupwise.model.loading import LoadedModel
from groupwise.types import Completion, SampleRequest, SamplingParams

Lab = Any

MIXED = (
    SamplingParams(temperature=1.0, max_tokens=20),
    SamplingParams(temperature=0.6, max_tokens=33, top_k=20),
    SamplingParams(temperature=1.0, max_tokens=7, top_p=0.8),
    SamplingParams(temperature=0.0, max_tokens=12),
    SamplingParams(temperature=1.7, max_tokens=20, min_p=0.05, repetition_penalty=1.3),
    SamplingParams(temperature=1.0, max_tokens=3, min_tokens=2, seed=5),
)


@pytest.fixture
def set_threads() -> Iterator[Any]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def without_stops(loaded: LoadedModel) -> LoadedModel:
    return replace(loaded, stop_token_ids=())


def greedy_twin(loaded: LoadedModel, prompt: tuple[int, ...], count: int) -> list[int]:
    twin = copy.deepcopy(loaded.model)
    twin.set_attn_implementation("eager")
    assert twin.generation_config is not None
    twin.generation_config.eos_token_id = None
    out = twin.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=count, pad_token_id=0)  # pyright: ignore[reportCallIssue]
    return out[0, len(prompt) :].tolist()


def test_greedy_tokens_are_those_of_transformers(lab: Lab, architecture: str) -> None:
    loaded = without_stops(lab.model(architecture))
    prompts = [lab.prompt(f"p{n}", n) for n in (1, 63, 64, 65)]
    requests = lab.requests(prompts, [SamplingParams(temperature=0.0, max_tokens=40)])
    found = lab.run(lab.engine(loaded), requests)
    seen: set[int] = set()
    for request in requests:
        wanted = greedy_twin(loaded, request.prompt.token_ids, 40)
        assert list(found[request.id].token_ids) == wanted, request.id
        seen |= set(wanted)
    assert len(seen) > 6, "loops of one token would prove little"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_recorded_log_probs_are_the_trainers_to_the_bit(lab: Lab, architecture: str, dtype: torch.dtype) -> None:
    loaded = lab.model(architecture, dtype=dtype)
    lengths = (1, 64, 70) if dtype == torch.float32 else (1, 66)
    sampling = MIXED if dtype == torch.float32 else tuple(replace(s, max_tokens=6) for s in MIXED[:4])
    requests = lab.requests([lab.prompt(f"p{n}", n) for n in lengths], sampling)
    found = lab.run(lab.engine(loaded), requests)
    assert sum(len(c.token_ids) for c in found.values()) > 30
    lab.assert_no_mismatch(loaded, requests, found)


def test_long_completions_cross_blocks_without_mismatch(lab: Lab) -> None:
    loaded = without_stops(lab.model("gemma3"))
    requests = lab.requests(
        [lab.prompt("a", 30), lab.prompt("b", 1)], [SamplingParams(max_tokens=n) for n in (64, 65, 140)]
    )
    found = lab.run(lab.engine(loaded), requests)
    assert sorted(len(c.token_ids) for c in found.values()) == [64, 64, 65, 65, 140, 140]
    lab.assert_no_mismatch(loaded, requests, found)


@pytest.mark.parametrize("number", [1, 3, 4])
@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_no_mismatch_on_any_number_of_threads(lab: Lab, name: str, number: int, set_threads: Any) -> None:
    """Odd sizes and many rows, so that threads share a layer out unevenly."""
    set_threads(number)
    loaded = without_stops(lab.model(name, intermediate_size=1234, vocab_size=1001))
    requests = lab.requests(
        [lab.prompt("a", 30), lab.prompt("b", 9)], [SamplingParams(max_tokens=n) for n in range(4, 24)]
    )
    found = lab.run(lab.engine(loaded), requests)
    lab.assert_no_mismatch(loaded, requests, found)


def test_no_mismatch_with_a_large_vocabulary_and_a_single_sample(lab: Lab) -> None:
    """A single row of many numbers is what torch shares out among threads."""
    loaded = without_stops(lab.model(vocab_size=99_001))
    requests = lab.requests([lab.prompt("a", 3)], [SamplingParams(max_tokens=20)])
    found = lab.run(lab.engine(loaded), requests)
    lab.assert_no_mismatch(loaded, requests, found)


@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_samples_are_the_same_bits_in_any_company_order_and_memory(lab: Lab, name: str) -> None:
    loaded = lab.model(name)
    requests = lab.requests([lab.prompt(f"p{n}", n) for n in (1, 66)], MIXED)
    wanted = lab.run(lab.engine(loaded), requests)
    for most in (1, 7, 64):
        shuffled = random.Random(most).sample(requests, len(requests))
        assert lab.run(lab.engine(loaded, max_concurrent_samples=most), shuffled) == wanted, most
    # One sample of 33 + 66 tokens takes three blocks; four hold two of them.
    block = 64 * 2 * loaded.model.config.num_hidden_layers * 2 * 16 * 4
    for blocks in (3, 4):
        engine = lab.engine(loaded, kv_cache_gib=(blocks + 0.5) * block / 2**30)
        assert lab.run(engine, requests) == wanted, blocks
    for request in requests[::5]:
        assert lab.run(lab.engine(loaded), [request]) == {request.id: wanted[request.id]}


def test_a_request_alone_asked_again_is_the_same_sample(lab: Lab) -> None:
    """Also on an engine that has done other things, and also when the first attempt was cut short."""
    loaded = without_stops(lab.model())
    requests = lab.requests([lab.prompt("a", 9), lab.prompt("b", 70)], [SamplingParams(max_tokens=30)] * 3)
    wanted = lab.run(lab.engine(loaded), requests)
    engine = lab.engine(loaded)

    async def abort_then_retry() -> dict[str, Completion]:
        task = asyncio.ensure_future(lab.collect(engine, requests))
        for _ in range(8):
            await asyncio.sleep(0)
        await engine.abort([r.id for r in requests[1:4]])
        first = await task
        for request in requests[1:4]:
            partial = first[request.id]
            assert partial.finish_reason == "abort"
            assert 0 < len(partial.token_ids) < 30
            assert partial.token_ids == wanted[request.id].token_ids[: len(partial.token_ids)]
            assert partial.logprobs == wanted[request.id].logprobs[: len(partial.logprobs)]
        return first | await lab.collect(engine, requests[1:4])

    assert asyncio.run(abort_then_retry()) == wanted


def test_seed_and_every_part_of_the_key_decide(lab: Lab) -> None:
    loaded = without_stops(lab.model())
    prompt = lab.prompt("a", 9)
    base = SampleRequest.of(prompt, 0, SamplingParams(max_tokens=20))
    others = [
        replace(base, key=replace(base.key, sample_index=1)),
        replace(base, sampling=SamplingParams(max_tokens=20, seed=1)),
        replace(base, key=replace(base.key, uid="b")),
        replace(base, key=replace(base.key, draw=1)),
    ]
    tokens = {lab.run(lab.engine(loaded), [r])[r.id].token_ids for r in (base, *others)}
    assert len(tokens) == 5


def test_prompts_of_one_uid_but_other_tokens_are_not_mixed_up(lab: Lab) -> None:
    loaded = without_stops(lab.model())
    one, two = lab.prompt("a", 9), replace(lab.prompt("b", 12), uid="a")
    sampling = SamplingParams(max_tokens=10)
    requests = [SampleRequest.of(one, 0, sampling), SampleRequest.of(two, 1, sampling)]
    together = lab.run(lab.engine(loaded), requests)
    for request in requests:
        assert lab.run(lab.engine(loaded), [request]) == {request.id: together[request.id]}


def test_the_likeliest_tokens_have_the_trainers_log_probs_and_change_no_sample(lab: Lab) -> None:
    loaded = without_stops(lab.model())
    requests = lab.requests([lab.prompt(f"p{n}", n) for n in (1, 66)], MIXED)
    plain = lab.run(lab.engine(loaded), requests)
    asked = [replace(request, likeliest=4 * (number % 2)) for number, request in enumerate(requests)]
    found = lab.run(lab.engine(loaded), asked)
    for request in asked:
        completion = found[request.id]
        assert replace(completion, likeliest=()) == plain[request.id]
        assert len(completion.likeliest) == (len(completion.token_ids) if request.likeliest else 0)
        for place in range(0, len(completion.likeliest), 5):
            told = completion.likeliest[place]
            assert [value for _, value in told] == sorted((value for _, value in told), reverse=True)
            for token, value in told:
                with_it = replace(completion, token_ids=(*completion.token_ids[:place], token))
                (again,) = lab.recomputed(loaded, [request], {request.id: with_it}).values()
                assert float(again[-1]) == value
            most = max(value for _, value in told)
            assert completion.logprobs[place] <= most


def test_more_likely_tokens_than_there_are_are_all(lab: Lab) -> None:
    loaded = without_stops(lab.model())
    (request,) = lab.requests([lab.prompt("a", 3)], [SamplingParams(max_tokens=2, temperature=1.7)])
    (completion,) = lab.run(lab.engine(loaded), [replace(request, likeliest=10_000)]).values()
    for told in completion.likeliest:
        assert len(told) == len({token for token, _ in told}) == loaded.text_config.vocab_size
        assert sum(math.exp(value) for _, value in told) == pytest.approx(1.0, abs=1e-5)


def test_a_turn_that_goes_on_tells_of_what_it_draws_alone(lab: Lab) -> None:
    loaded = without_stops(lab.model())
    (first,) = lab.requests([lab.prompt("a", 9)], [SamplingParams(max_tokens=5)])
    engine = lab.engine(loaded)
    (begun,) = lab.run(engine, [replace(first, keeps=True)]).values()
    answered = ModelInput.of((*begun.token_ids, 7, 8, 9))
    (second,) = lab.run(engine, [replace(first, continues=answered, likeliest=2)]).values()
    (alone,) = lab.run(lab.engine(loaded), [replace(first, continues=answered, likeliest=2)]).values()
    assert len(second.likeliest) == len(second.logprobs) == 5
    assert second == alone
