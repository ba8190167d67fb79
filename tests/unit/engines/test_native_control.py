"""What can happen to a running engine: aborts, company, early ends, errors, new weights, little memory."""

from __future__ import annotations

import asyncio
import gc
from dataclasses import replace
from typing import Any

import pytest
import torch

from groupwise.engines.native import NativeEngine
from groupwise.errors import EngineError
from groupwise.inputs import ModelInput
from groupwise.model.loading import LoadedModel
from groupwise.protocols import Engine
from groupwise.types import Completion, SampleRequest, SamplingParams

Lab = Any
LONG = SamplingParams(max_tokens=40)


@pytest.fixture
def loaded(lab: Lab) -> LoadedModel:
    return replace(lab.model(), stop_token_ids=())


def block_gib(loaded: LoadedModel, blocks: float) -> float:
    """GiB of so many blocks of 64 tokens."""
    return blocks * 64 * 2 * loaded.model.config.num_hidden_layers * 2 * 16 * 4 / 2**30


def assert_idle(engine: NativeEngine) -> None:
    scheduler = engine._scheduler
    assert not scheduler.busy
    assert not scheduler.prompts, "a prompt outlived its samples"


async def steps(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


def test_it_is_an_engine(lab: Lab, loaded: LoadedModel) -> None:
    engine: Engine = lab.engine(loaded)
    assert engine.caps.name == "native"
    assert engine.caps.exact_logprobs
    assert engine.caps.seeded


def test_no_requests_give_no_completions(lab: Lab, loaded: LoadedModel) -> None:
    assert lab.run(lab.engine(loaded), []) == {}


def test_completions_come_as_each_finishes(lab: Lab, loaded: LoadedModel) -> None:
    engine = lab.engine(loaded)
    requests = lab.requests([lab.prompt("a", 5)], [SamplingParams(max_tokens=n) for n in (30, 2, 10)])

    async def order() -> list[int]:
        return [completion.sample_index async for completion in engine.generate(requests)]

    assert asyncio.run(order()) == [1, 2, 0]


@pytest.mark.parametrize("settings", [{}, {"max_concurrent_samples": 2}], ids=["running", "waiting too"])
def test_abort_ends_all_with_what_they_have(lab: Lab, loaded: LoadedModel, settings: dict[str, int]) -> None:
    engine = lab.engine(loaded, **settings)
    requests = lab.requests([lab.prompt("a", 5), lab.prompt("b", 70)], [LONG] * 2)

    async def go() -> dict[str, Completion]:
        task = asyncio.ensure_future(lab.collect(engine, requests))
        await steps(6)
        await engine.abort()
        return await task

    found = asyncio.run(go())
    assert {c.finish_reason for c in found.values()} == {"abort"}
    assert 0 < max(len(c.token_ids) for c in found.values()) < 40
    assert_idle(engine)


def test_abort_of_some_leaves_the_others_bits(lab: Lab, loaded: LoadedModel) -> None:
    """Lanes move while the model is between two steps."""
    requests = lab.requests([lab.prompt("a", 5), lab.prompt("b", 70), lab.prompt("c", 66)], [LONG] * 3)
    wanted = lab.run(lab.engine(loaded), requests)
    engine = lab.engine(loaded)
    gone = [r.id for r in requests[:4]]

    async def go() -> dict[str, Completion]:
        task = asyncio.ensure_future(lab.collect(engine, requests))
        await steps(8)
        await engine.abort(gone)
        await engine.abort(["nobody"])
        return await task

    found = asyncio.run(go())
    for request in requests:
        if request.id in gone:
            assert found[request.id].finish_reason == "abort"
        else:
            assert found[request.id] == wanted[request.id]
    assert_idle(engine)


def test_a_prompt_kept_for_a_waiting_sample_does_not_meet_new_weights(lab: Lab, loaded: LoadedModel) -> None:
    """The first sample ends, the second waits for its prompt and is aborted; then the weights change."""
    engine = lab.engine(loaded, max_concurrent_samples=1)
    requests = lab.requests([lab.prompt("a", 5)], [SamplingParams(max_tokens=1)] * 2)

    async def go() -> None:
        async for completion in engine.generate(requests):
            if completion.sample_index == 0:
                await engine.abort([requests[1].id])

    asyncio.run(go())
    assert_idle(engine)
    change(loaded)
    again = lab.requests([lab.prompt("a", 5)], [LONG], version=1)
    asyncio.run(engine.update_weights(1))
    lab.assert_no_mismatch(loaded, again, lab.run(engine, again))


def test_two_generations_share_the_engine(lab: Lab, loaded: LoadedModel) -> None:
    requests = lab.requests([lab.prompt("a", 5), lab.prompt("b", 70)], [LONG] * 3)
    wanted = lab.run(lab.engine(loaded), requests)
    engine = lab.engine(loaded, max_concurrent_samples=4)

    async def go() -> dict[str, Completion]:
        first = asyncio.ensure_future(lab.collect(engine, requests[:4]))
        await steps(5)
        return await lab.collect(engine, requests[4:]) | await first

    assert asyncio.run(go()) == wanted
    assert_idle(engine)


def test_a_generator_closed_early_leaves_no_sample_behind(lab: Lab, loaded: LoadedModel) -> None:
    requests = lab.requests(
        [lab.prompt("a", 5), lab.prompt("b", 70)], [SamplingParams(max_tokens=n) for n in (3, 40, 40)]
    )
    others = lab.requests([lab.prompt("c", 9)], [LONG] * 2)
    wanted = lab.run(lab.engine(loaded), others)
    engine = lab.engine(loaded)

    async def go() -> dict[str, Completion]:
        beside = asyncio.ensure_future(lab.collect(engine, others))
        stream = engine.generate(requests)
        async for _ in stream:
            break
        await stream.aclose()  # type: ignore[attr-defined]
        assert len(engine._scheduler.running) == len(others)
        return await beside

    assert asyncio.run(go()) == wanted
    assert_idle(engine)


def test_closing_one_of_two_equal_generations_does_not_strand_the_other(lab: Lab, loaded: LoadedModel) -> None:
    requests = lab.requests([lab.prompt("a", 5)], [SamplingParams(max_tokens=3), LONG])
    wanted = lab.run(lab.engine(loaded), requests)
    engine = lab.engine(loaded)

    async def go() -> dict[str, Completion]:
        beside = asyncio.ensure_future(lab.collect(engine, requests))
        stream = engine.generate(requests)
        async for _ in stream:
            break
        await stream.aclose()  # type: ignore[attr-defined]
        return await asyncio.wait_for(beside, 60)

    assert asyncio.run(go()) == wanted


def test_a_cancelled_caller_frees_its_samples(lab: Lab, loaded: LoadedModel) -> None:
    engine = lab.engine(loaded)
    requests = lab.requests([lab.prompt("a", 5)], [LONG] * 2)

    async def go() -> None:
        task = asyncio.ensure_future(lab.collect(engine, requests))
        await steps(6)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(go())
    assert_idle(engine)
    assert len(lab.run(engine, requests)) == 2


def test_an_error_in_a_step_reaches_every_caller_and_the_engine_goes_on(
    lab: Lab, loaded: LoadedModel, caplog: pytest.LogCaptureFixture
) -> None:
    requests = lab.requests([lab.prompt("a", 5), lab.prompt("b", 70)], [LONG] * 2)
    wanted = lab.run(lab.engine(loaded), requests)
    engine = lab.engine(loaded)
    calls = 0

    def fail(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 9:
            raise RuntimeError("the chip is on fire")

    async def go() -> list[dict[str, Completion] | BaseException]:
        tasks = [asyncio.ensure_future(lab.collect(engine, part)) for part in (requests[:1], requests[1:])]
        return await asyncio.gather(*tasks, return_exceptions=True)

    handle = loaded.model.get_decoder().register_forward_hook(fail)
    results = asyncio.run(go())
    handle.remove()
    assert [str(r) for r in results] == ["the chip is on fire"] * 2
    assert_idle(engine)
    assert lab.run(engine, requests) == wanted
    gc.collect()
    assert "never retrieved" not in caplog.text


def test_too_little_memory_names_the_setting(lab: Lab, loaded: LoadedModel) -> None:
    engine = lab.engine(loaded, kv_cache_gib=block_gib(loaded, 1.5))
    request = SampleRequest.of(lab.prompt("a", 5), 0, LONG)
    with pytest.raises(EngineError, match=r"5 prompt and 40 completion.*rollout\.kv_cache_gib.*max_completion_tokens"):
        lab.run(engine, [request])
    assert_idle(engine)
    enough = lab.engine(loaded, kv_cache_gib=block_gib(loaded, 2.0))
    assert len(lab.run(enough, [request])) == 1


def test_caches_of_short_samples_do_not_grow_past_the_bound_for_long_ones(lab: Lab, loaded: LoadedModel) -> None:
    bound = 40
    engine = lab.engine(loaded, kv_cache_gib=block_gib(loaded, bound + 0.5))
    short = lab.requests([lab.prompt("a", 5)], [SamplingParams(max_tokens=2)] * 36)
    lab.run(engine, short)
    assert engine._scheduler.sample_cache.lanes == 36
    long = lab.requests([lab.prompt("a", 5)], [SamplingParams(max_tokens=200)] * 2)
    found = lab.run(engine, long)
    caches = (engine._scheduler.sample_cache, engine._scheduler.prompt_cache)
    assert sum(cache.lanes * -(-cache.tokens // 64) for cache in caches) <= bound
    assert found == lab.run(lab.engine(loaded), long)


def test_another_version_is_refused_both_ways(lab: Lab, loaded: LoadedModel) -> None:
    engine = lab.engine(loaded)
    later = lab.requests([lab.prompt("a", 5)], [LONG], version=3)
    with pytest.raises(EngineError, match="version 3, but this engine holds 0"):
        lab.run(engine, later)
    asyncio.run(engine.update_weights(3))
    found = lab.run(engine, later)
    assert set(found[later[0].id].policy_versions) == {3}
    with pytest.raises(EngineError, match="version 0, but this engine holds 3"):
        lab.run(engine, lab.requests([lab.prompt("a", 5)], [LONG]))


def test_neither_new_weights_nor_sleep_while_samples_run(lab: Lab, loaded: LoadedModel) -> None:
    engine = lab.engine(loaded)
    requests = lab.requests([lab.prompt("a", 5)], [LONG])
    wanted = lab.run(lab.engine(loaded), requests)

    async def go() -> dict[str, Completion]:
        task = asyncio.ensure_future(lab.collect(engine, requests))
        await steps(5)
        with pytest.raises(EngineError, match="weights changed while samples were running"):
            await engine.update_weights(1)
        with pytest.raises(EngineError, match="cannot be closed"):
            await engine.close()
        return await task

    assert asyncio.run(go()) == wanted


def change(loaded: LoadedModel) -> None:
    """Other weights in the same tensors, as an optimiser leaves them."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)


def test_weights_changed_in_place_are_served_at_once(lab: Lab, loaded: LoadedModel) -> None:
    engine = lab.engine(loaded)
    seen: set[tuple[int, ...]] = set()
    for version in range(3):
        if version:
            change(loaded)
            asyncio.run(engine.update_weights(version))
        requests = lab.requests([lab.prompt("a", 5), lab.prompt("b", 66)], [LONG] * 2, version=version)
        found = lab.run(engine, requests)
        lab.assert_no_mismatch(loaded, requests, found)
        seen.add(found[requests[0].id].token_ids)
    assert len(seen) == 3


def test_sleep_frees_the_caches_and_waking_changes_nothing(lab: Lab, loaded: LoadedModel) -> None:
    engine = lab.engine(loaded)
    requests = lab.requests([lab.prompt("a", 5)], [LONG] * 2)
    before = lab.run(engine, requests)
    asyncio.run(engine.close())
    assert engine._scheduler.sample_cache.tokens == engine._scheduler.prompt_cache.tokens == 0
    assert lab.run(engine, requests) == before


@pytest.mark.parametrize(
    ("tokens", "sampling", "message"),
    [
        ((), LONG, "prompt x has no tokens"),
        ((3, 283), LONG, "tokens from 3 to 283.*embeddings for 0 to 282"),
        ((-1, 5), LONG, "tokens from -1 to 5"),
        ((3,), SamplingParams(max_tokens=0), "max_tokens = 0"),
    ],
)
def test_requests_that_cannot_run_are_refused_alone(
    lab: Lab, loaded: LoadedModel, tokens: tuple[int, ...], sampling: SamplingParams, message: str
) -> None:
    engine = lab.engine(loaded)
    good = lab.requests([lab.prompt("a", 5)], [LONG])
    bad = SampleRequest.of(replace(lab.prompt("x", 1), input=ModelInput.of(tokens)), 0, sampling)

    async def go() -> dict[str, Completion]:
        beside = asyncio.ensure_future(lab.collect(engine, good))
        await steps(3)
        with pytest.raises(EngineError, match=message):
            await lab.collect(engine, [bad])
        return await beside

    assert len(asyncio.run(go())) == 1


def test_one_engine_serves_event_loop_after_event_loop(lab: Lab, loaded: LoadedModel) -> None:
    engine = lab.engine(loaded)
    requests = lab.requests([lab.prompt("a", 5)], [LONG])

    async def left_open() -> None:
        async for _ in engine.generate(lab.requests([lab.prompt("b", 5)], [SamplingParams(max_tokens=2), LONG])):
            break  # neither closed nor drained; the loop ends here

    asyncio.run(left_open())
    assert lab.run(engine, requests) == lab.run(lab.engine(loaded), requests)


def test_weights_that_change_in_the_callers_turn_are_the_ones_sampled_from(lab: Lab, loaded: LoadedModel) -> None:
    engine = lab.engine(loaded)
    sampling = [SamplingParams(max_tokens=8)] * 2

    async def both() -> dict[str, Completion]:
        async for _ in engine.generate(lab.requests([lab.prompt("a", 5)], sampling)):
            pass
        with torch.no_grad():
            for weight in loaded.model.parameters():
                weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) * 0.05)
        await engine.update_weights(1)
        requests = lab.requests([lab.prompt("a", 5)], sampling, 1)
        return {completion.request_id: completion async for completion in engine.generate(requests)}

    found = asyncio.run(both())
    lab.assert_no_mismatch(loaded, lab.requests([lab.prompt("a", 5)], sampling, 1), found)


def test_a_completion_that_cannot_be_made_fails_its_caller(
    lab: Lab, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = lab.engine(loaded)

    def broken(*_: object) -> Completion:
        raise TypeError("no text")

    monkeypatch.setattr(engine, "_completion", broken)

    async def collect() -> object:
        requests = lab.requests([lab.prompt("a", 5)], [SamplingParams(max_tokens=3)])
        return await asyncio.wait_for(lab.collect(engine, requests), 20)

    with pytest.raises(TypeError, match="no text"):
        asyncio.run(collect())
    assert_idle(engine)
