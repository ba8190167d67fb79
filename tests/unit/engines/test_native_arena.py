"""The caches and sizes of a GPU's steps, run on a CPU: everything but the graphs themselves."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch

from groupwise.engines.native import NativeEngine
from groupwise.engines.native.cache import ArenaCache, CacheShape
from groupwise.engines.native.scheduler import Sample, Scheduler
from groupwise.errors import EngineError
from groupwise.types import Prompt, SampleRequest, SamplingParams
from tests.unit.engines.conftest import Lab

SHAPE = CacheShape(2, 2, 16, torch.float32, torch.device("cpu"), fixed=True, graphs=True)


def as_on_a_gpu(engine: NativeEngine) -> NativeEngine:
    engine._scheduler.shape = replace(engine._scheduler.shape, fixed=True, graphs=True)
    engine._scheduler.drop_caches()
    return engine


@pytest.mark.parametrize("name", ["qwen3", "gemma3", "llama"])
@pytest.mark.parametrize("samples", [2, 64])
def test_arenas_and_padded_steps_give_the_tokens_of_blocks(name: str, samples: int, lab: Lab) -> None:
    loaded = lab.model(name)
    prompts = [lab.prompt("a", 5), lab.prompt("b", 70), lab.prompt("c", 1)]
    sampling = [SamplingParams(max_tokens=count, min_tokens=count, temperature=0) for count in (70, 3, 40)]
    requests = lab.requests(prompts, sampling)
    wanted = lab.run(lab.engine(loaded, max_concurrent_samples=samples), requests)
    found = lab.run(as_on_a_gpu(lab.engine(loaded, max_concurrent_samples=samples)), requests)
    for request_id, completion in wanted.items():
        assert found[request_id].token_ids == completion.token_ids
        torch.testing.assert_close(
            torch.tensor(found[request_id].logprobs), torch.tensor(completion.logprobs), rtol=0, atol=1e-4
        )


class Arenas:
    """Counts the bytes of all arenas that are alive."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = self.most = 0
        make, drop = ArenaCache._empty, self._drop

        def empty(cache: ArenaCache, lanes: int, tokens: int) -> torch.Tensor:
            import weakref

            arena = make(cache, lanes, tokens)
            self.now += arena.nbytes
            self.most = max(self.most, self.now)
            weakref.finalize(arena, drop, arena.nbytes)
            return arena

        monkeypatch.setattr(ArenaCache, "_empty", empty)

    def _drop(self, count: int) -> None:
        self.now -= count


def sample(prompt: int, index: int, tokens: int, length: int = 9) -> Sample:
    made = Prompt(uid=f"p{prompt}", messages=(), text="", token_ids=tuple(range(3, 3 + length)))
    return Sample(SampleRequest(made, index, SamplingParams(max_tokens=tokens)), asyncio.Queue())


def run(scheduler: Scheduler, samples: Sequence[Sample], *, at_once: int = 3) -> int:
    """Admit and release until nothing is left, some at a time; returns the most that ran together."""
    scheduler.waiting.extend(samples)
    most = 0
    while scheduler.busy:
        scheduler.admit()
        most = max(most, len(scheduler.running))
        for prompt in scheduler.prompts:
            prompt.hidden = torch.zeros(1)
        scheduler.make_room(max(s.request.sampling.max_tokens for s in scheduler.running))
        for done in list(scheduler.running)[:at_once]:
            scheduler.release(done)
    return most


@pytest.mark.parametrize(("tokens", "lanes"), [(200, 31), (1000, 8), (256, 70), (3000, 3)])
def test_arenas_stay_under_the_bound(tokens: int, lanes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    arenas = Arenas(monkeypatch)
    bound = SHAPE.bytes_per_token * (lanes * SHAPE.room(tokens) + 8 * SHAPE.room(9))
    scheduler = Scheduler(SHAPE, max_samples=100, max_bytes=bound)
    first = [sample(i // 8, i % 8, tokens) for i in range(100)]
    assert run(scheduler, first) >= lanes // 2
    assert arenas.most <= bound
    # Longer ones, while some of the first still run; then many prompts.
    scheduler.waiting.extend([sample(50, i, tokens) for i in range(2)])
    scheduler.admit()
    for prompt in scheduler.prompts:
        prompt.hidden = torch.zeros(1)
    run(scheduler, [sample(60 + i, 0, tokens + 300, length=40) for i in range(20)], at_once=1)
    assert arenas.most <= bound


def test_a_sample_that_can_never_fit_is_refused() -> None:
    scheduler = Scheduler(SHAPE, max_samples=4, max_bytes=SHAPE.bytes_per_token * 600)
    scheduler.waiting.append(sample(0, 0, 500))
    with pytest.raises(EngineError, match=r"9 prompt and 500 completion tokens needs .* rollout.kv_cache_gib"):
        scheduler.admit()


@pytest.mark.parametrize("count", [SHAPE.lanes_for, SHAPE.prompts_for, SHAPE.tokens_for])
def test_few_sizes_serve_all(count: Callable[[int], int]) -> None:
    sizes = [count(n) for n in range(1, 40_000)]
    assert all(size >= n for n, size in enumerate(sizes, 1))
    assert sizes == sorted(sizes)
    if count == SHAPE.tokens_for:
        assert len(set(sizes)) < 40
        assert all(size < max(n + 256, 1.25 * n) for n, size in enumerate(sizes, 1))
    else:
        assert sizes[:3] == [1, 2, 4]
