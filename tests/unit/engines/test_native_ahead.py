"""Steps that run ahead of the host, on a CPU: what a GPU does, but for the graphs themselves."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest
import torch

from groupwise.engines.native import NativeEngine
from groupwise.engines.native.ahead import Flight, StepsAhead
from groupwise.types import Completion, SamplingParams


def flying(engine: NativeEngine, monkeypatch: pytest.MonkeyPatch) -> tuple[NativeEngine, list[Flight]]:
    """The engine with a GPU's steps, and the flights that it starts."""
    scheduler = engine._scheduler
    scheduler.shape = replace(scheduler.shape, fixed=True, graphs=True)
    scheduler.drop_caches()
    ahead = StepsAhead(engine._loaded, scheduler)
    engine._steps._ahead = ahead
    flights: list[Flight] = []
    launch = ahead.launch

    def spy(*arguments: Any) -> Flight | None:
        flight = launch(*arguments)
        if flight is not None:
            flights.append(flight)
            params = [(sample.request.sampling, len(sample.tokens)) for sample in flight.samples]
            assert all(can_fly(*known) for known in params), params
        return flight

    monkeypatch.setattr(ahead, "launch", spy)
    return engine, flights


def can_fly(sampling: SamplingParams, drawn: int) -> bool:
    """Whether the device can draw for it alone, from the whole distribution."""
    filters = sampling.top_k, sampling.top_p, sampling.min_p, sampling.repetition_penalty
    return filters == (0, 1.0, 0.0, 1.0) and drawn >= sampling.min_tokens


def assert_close(found: dict[str, Completion], wanted: dict[str, Completion]) -> None:
    assert found.keys() == wanted.keys()
    for request_id, completion in wanted.items():
        assert found[request_id].token_ids == completion.token_ids
        assert found[request_id].finish_reason == completion.finish_reason
        torch.testing.assert_close(
            torch.tensor(found[request_id].logprobs), torch.tensor(completion.logprobs), rtol=0, atol=1e-4
        )


@pytest.mark.parametrize("name", ["qwen3", "gemma3", "llama"])
@pytest.mark.parametrize("samples", [3, 64])
def test_what_is_drawn_ahead_is_what_is_drawn_step_by_step(
    name: str, samples: int, lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = replace(lab.model(name), stop_token_ids=(7, 9, 11, 30, 31))
    prompts = [lab.prompt("a", 5), lab.prompt("b", 70), lab.prompt("c", 1)]
    sampling = [SamplingParams(max_tokens=n, temperature=t) for n, t in ((70, 1.0), (1, 1.0), (2, 0.7), (40, 0.0))]
    requests = lab.requests(prompts, sampling)
    wanted = lab.run(lab.engine(loaded, max_concurrent_samples=samples), requests)
    engine, flights = flying(lab.engine(loaded, max_concurrent_samples=samples), monkeypatch)
    found = lab.run(engine, requests)
    assert_close(found, wanted)
    assert {completion.finish_reason for completion in found.values()} == {"stop", "length"}
    steps = max(len(completion.token_ids) for completion in found.values())
    assert len(flights) >= steps - 2
    assert lab.run(engine, requests) == found


def test_a_sample_that_the_host_must_draw_for_stops_the_flight_of_all(
    lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = lab.model("qwen3")
    prompts = [lab.prompt("a", 5), lab.prompt("b", 9)]
    free = SamplingParams(max_tokens=30)
    bound = [SamplingParams(max_tokens=6, top_k=5), SamplingParams(max_tokens=9, repetition_penalty=1.2)]
    bound += [SamplingParams(max_tokens=12, min_tokens=4), SamplingParams(max_tokens=3, top_p=0.5)]
    requests = lab.requests(prompts, [free, *bound])
    wanted = lab.run(lab.engine(loaded, max_concurrent_samples=4), requests)
    engine, flights = flying(lab.engine(loaded, max_concurrent_samples=4), monkeypatch)
    assert_close(lab.run(engine, requests), wanted)
    assert flights
    assert all(flight.samples for flight in flights)
    flown = {sample.request.sampling for flight in flights for sample in flight.samples}
    assert flown == {free, bound[2]}  # one of them once its stop tokens could be drawn


def test_an_aborted_sample_keeps_what_was_read_and_its_lane_goes_to_another(
    lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = lab.model("qwen3")
    prompt = lab.prompt("a", 5)
    requests = lab.requests([prompt], [SamplingParams(max_tokens=60)] * 5)
    wanted = lab.run(lab.engine(loaded), requests)
    engine, flights = flying(lab.engine(loaded, max_concurrent_samples=4), monkeypatch)

    async def abort_one() -> dict[str, Completion]:
        found: dict[str, Completion] = {}

        async def collect() -> None:
            async for completion in engine.generate(requests):
                found[completion.request_id] = completion

        task = asyncio.create_task(collect())
        while len(flights) < 10:
            await asyncio.sleep(0)
        await engine.abort([requests[1].id])
        await task
        return found

    found = asyncio.run(abort_one())
    gone = found.pop(requests[1].id)
    whole = wanted.pop(requests[1].id)
    assert gone.finish_reason == "abort"
    assert 0 < len(gone.token_ids) < 60
    assert gone.token_ids == whole.token_ids[: len(gone.token_ids)]
    assert_close(found, wanted)


def test_an_error_in_flight_reaches_every_caller_and_the_engine_works_again(
    lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = lab.model("qwen3")
    requests = lab.requests([lab.prompt("a", 5)], [SamplingParams(max_tokens=20)] * 2)
    engine, _ = flying(lab.engine(loaded), monkeypatch)
    wanted = lab.run(engine, requests)
    read = Flight.read
    monkeypatch.setattr(Flight, "read", lambda flight: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        lab.run(engine, requests)
    monkeypatch.setattr(Flight, "read", read)
    assert lab.run(engine, requests) == wanted
