"""The native engine tells which experts it chose: those of the trainer's own forward, whatever it is sampled beside."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from groupwise.config import RolloutConfig
from groupwise.engines.native import NativeEngine
from groupwise.errors import EngineError
from groupwise.inputs import ModelInput, SampleKey
from groupwise.model.forward.hidden_states import packed_hidden_states
from groupwise.model.forward.packing import pack_sequences
from groupwise.model.forward.routing import Choices
from groupwise.model.loading import LoadedModel, wrap_model
from groupwise.types import Completion, SampleRequest, SamplingParams

PROMPTS = ((5, 9, 11, 40), (8, 8, 3))


@pytest.fixture
def mixture(make_mixture: Callable[..., PreTrainedModel], lab: Any) -> LoadedModel:
    return replace(wrap_model(make_mixture("glm4_moe"), lab.tokenizer), stop_token_ids=())


def engine_of(loaded: LoadedModel, **settings: Any) -> NativeEngine:
    return NativeEngine(loaded, RolloutConfig.model_validate(settings))


def request(number: int, *, most: int = 7, continues: tuple[int, ...] = (), **more: Any) -> SampleRequest:
    prompt = ModelInput.of(PROMPTS[number % 2])
    sampling = SamplingParams(max_tokens=most, min_tokens=most)
    key = SampleKey(f"p{number % 2}", 0, number)
    return SampleRequest(key, prompt, sampling, continues=ModelInput.of(continues), **more)


async def drawn(engine: NativeEngine, requests: list[SampleRequest]) -> list[Completion]:
    found = {one.key: one async for one in engine.generate(requests)}
    return [found[one.key] for one in requests]


def by_the_trainer(loaded: LoadedModel, tokens: list[int]) -> Tensor:
    """`[tokens, L, k]`, of one packed pass."""
    choices = Choices()
    with torch.no_grad(), choices.recording():
        packed_hidden_states(loaded.model, pack_sequences([(tokens, ())]))
    return torch.stack(choices.chosen, 1)[: len(tokens)]


def check(loaded: LoadedModel, one: SampleRequest, completion: Completion) -> None:
    routes = completion.sides.routes
    assert routes is not None
    tokens = [*one.prompt.token_ids, *one.continues.token_ids, *completion.token_ids]
    wanted = by_the_trainer(loaded, tokens)[one.routes_from : len(tokens) - 1]
    found = torch.frombuffer(bytearray(routes.data), dtype=torch.uint8).view(-1, routes.layers, routes.k)
    assert (routes.first, routes.rows) == (one.routes_from, len(tokens) - 1 - one.routes_from)
    assert torch.equal(found.long(), wanted)


@pytest.mark.parametrize("limit", [1, 3, 64])
def test_choices_are_the_trainers(mixture: LoadedModel, limit: int) -> None:
    """Two prompts, shared by samples of which some do not ask; a prompt is computed again for one that asks later."""
    engine = engine_of(mixture, max_concurrent_samples=limit)
    requests = [request(n, most=3 + n, wants_routes=n not in (0, 3)) for n in range(6)]
    found = asyncio.run(drawn(engine, requests))
    plain = asyncio.run(drawn(engine_of(mixture), [request(n, most=3 + n) for n in range(6)]))
    for number, (one, completion, without) in enumerate(zip(requests, found, plain, strict=True)):
        assert (completion.token_ids, completion.logprobs) == (without.token_ids, without.logprobs)
        if number in (0, 3):
            assert not completion.sides
        else:
            check(mixture, one, completion)


@pytest.mark.parametrize("keeps", [True, False])
@pytest.mark.parametrize("new", [2, 70])
def test_a_turn_tells_what_the_one_before_did_not(mixture: LoadedModel, keeps: bool, new: int) -> None:
    """From kept keys, fed one by one or computed again; and where they are gone."""
    engine = engine_of(mixture)
    answer = tuple(5 + n % 200 for n in range(new))

    async def play() -> None:
        first = request(1, wants_routes=True, keeps=keeps)
        [one] = await drawn(engine, [first])
        check(mixture, first, one)
        start = len(first.prompt) + len(one.token_ids) - 1
        second = request(1, continues=(*one.token_ids, *answer), wants_routes=True, routes_from=start, keeps=keeps)
        fresh = request(3, wants_routes=True)  # whose prompt may have come back with keys alone
        two, other = await drawn(engine, [second, fresh])
        check(mixture, second, two)
        check(mixture, fresh, other)

    asyncio.run(play())


def test_an_aborted_sample_tells_what_was_run(mixture: LoadedModel) -> None:
    async def play() -> Completion:
        engine = engine_of(mixture)
        waiting = asyncio.ensure_future(drawn(engine, [request(0, most=200, wants_routes=True)]))
        while not engine._scheduler.running or len(engine._scheduler.running[0].tokens) < 4:
            await asyncio.sleep(0)
        await engine.abort()
        return (await waiting)[0]

    completion = asyncio.run(play())
    assert completion.finish_reason == "abort"
    check(mixture, request(0, wants_routes=True), completion)


def test_a_dense_model_has_nothing_to_tell(lab: Any) -> None:
    with pytest.raises(EngineError, match="this model has none"):
        asyncio.run(drawn(engine_of(lab.model()), [request(0, wants_routes=True)]))
