"""The caches and sizes of a GPU's steps, run on a CPU: everything but the graphs themselves."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from groupwise.engines.native import NativeEngine
from groupwise.engines.native.budget import CacheBudget
from groupwise.engines.native.cache import ArenaCache, CacheShape
from groupwise.engines.native.scheduler import Sample, Scheduler
from groupwise.errors import EngineError
from groupwise.inputs import ModelInput
from groupwise.types import Prompt, SampleRequest, SamplingParams

SHAPE = CacheShape(2, 2, 16, torch.float32, torch.device("cpu"), fixed=True, graphs=True)


def as_on_a_gpu(engine: NativeEngine) -> NativeEngine:
    engine._scheduler.shape = replace(engine._scheduler.shape, fixed=True, graphs=True)
    engine._scheduler.drop_caches()
    return engine


@pytest.mark.parametrize("name", ["qwen3", "gemma3", "llama"])
@pytest.mark.parametrize("samples", [2, 64])
def test_arenas_and_padded_steps_give_the_tokens_of_blocks(name: str, samples: int, lab: Any) -> None:
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
            arena = make(cache, lanes, tokens)
            self.now += arena.nbytes
            self.most = max(self.most, self.now)
            weakref.finalize(arena, drop, arena.nbytes)
            return arena

        monkeypatch.setattr(ArenaCache, "_empty", empty)

    def _drop(self, count: int) -> None:
        self.now -= count


def sample(prompt: int, index: int, tokens: int, length: int = 9) -> Sample:
    made = Prompt(uid=f"p{prompt}", messages=(), text="", input=ModelInput.of(range(3 + prompt, 3 + prompt + length)))
    return Sample(SampleRequest.of(made, index, SamplingParams(max_tokens=tokens)), asyncio.Queue())


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
    bound = SHAPE.bytes_per_token * (lanes * SHAPE.capacity(tokens) + 8 * SHAPE.capacity(9))
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


def test_a_sample_longer_than_a_kept_prompts_arena_is_not_refused() -> None:
    scheduler = Scheduler(SHAPE, max_samples=32, max_bytes=SHAPE.bytes_per_token * 40 * 256)
    scheduler.waiting.extend([*(sample(0, i, 200) for i in range(32)), sample(0, 32, 500)])
    assert len(scheduler.admit()) == 32
    for prompt in scheduler.prompts:
        prompt.hidden = torch.zeros(1)
    for done in list(scheduler.running):
        scheduler.release(done)
    assert scheduler.prompts, "its prompt is kept for the sample that waits"
    assert len(scheduler.admit()) == 1
    assert scheduler.prompts[0].hidden is None, "the cache was made anew"


def test_a_prompt_that_is_let_go_while_others_run_counts_as_a_change() -> None:
    scheduler = Scheduler(SHAPE, max_samples=2, max_bytes=SHAPE.bytes_per_token * 40 * 256)
    last = sample(0, 1, 9)
    scheduler.waiting.extend([sample(0, 0, 9), sample(1, 0, 9), last])
    scheduler.admit()
    scheduler.release(scheduler.running[0])
    assert [prompt.token_ids[0] for prompt in scheduler.prompts] == [3, 4]
    before = scheduler.changes
    scheduler.remove([last])
    assert [prompt.token_ids[0] for prompt in scheduler.prompts] == [4]
    assert scheduler.changes > before


def test_blocks_stay_under_the_bound_while_something_lives() -> None:
    shape = replace(SHAPE, fixed=False, graphs=False)
    scheduler = Scheduler(shape, max_samples=64, max_bytes=shape.bytes_per_token * 40 * 64)
    scheduler.waiting.extend([*(sample(0, i, 9) for i in range(36)), sample(0, 36, 200), sample(0, 37, 200)])
    while scheduler.busy:
        scheduler.admit()
        for prompt in scheduler.prompts:
            prompt.hidden = torch.zeros(1)
        scheduler.make_room(max(s.request.sampling.max_tokens for s in scheduler.running))
        assert scheduler._budget.held(scheduler._caches) <= 40 * 64
        scheduler.release(scheduler.running[-1])
        if len(scheduler.running) > 1:
            scheduler.release(scheduler.running[-1])


@pytest.mark.parametrize("fixed", [False, True])
def test_old_caches_are_free_before_new_ones_are_made(fixed: bool, lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = lab.engine(replace(lab.model(), stop_token_ids=()))
    engine._scheduler.shape = replace(engine._scheduler.shape, fixed=fixed)
    engine._scheduler.drop_caches()
    prompt = lab.prompt("a", 5)
    # An arena that is too small, and blocks whose many lanes would all be too long.
    first, then = ((16, 64), (17, 64)) if fixed else ((60, 64), (4, 300))
    scheduler = engine._scheduler
    scheduler._budget = CacheBudget(scheduler.shape, 32 * 256 if fixed else 61 * 64)
    lab.run(engine, lab.requests([prompt], [SamplingParams(max_tokens=first[1], min_tokens=first[1])] * first[0]))
    old = [weakref.ref(cache) for cache in engine._scheduler._caches]
    storages = [
        x.untyped_storage()._weak_ref()
        for cache in engine._scheduler._caches
        for x in ([cache.arena] if fixed else [y for block in cache.blocks for y in (block.keys, block.values)])
    ]
    alive: list[int] = []
    make_room = Scheduler.make_room

    def watched(scheduler: Scheduler, tokens: int) -> None:
        if not alive:
            gc.collect()
        alive.append(sum(not torch.UntypedStorage._expired(s) for s in storages))
        make_room(scheduler, tokens)

    monkeypatch.setattr(Scheduler, "make_room", watched)
    lab.run(engine, lab.requests([prompt], [SamplingParams(max_tokens=then[1], min_tokens=9)] * then[0]))
    assert all(ref() is None for ref in old)
    assert alive[0] == 0


def test_caches_that_serve_are_kept(lab: Any) -> None:
    engine = lab.engine(replace(lab.model(), stop_token_ids=()))
    sampling = [SamplingParams(max_tokens=200, stop_token_ids=tuple(range(200)))] * 4
    lab.run(engine, lab.requests([lab.prompt("a", 5)], sampling))
    caches = engine._scheduler._caches
    lab.run(engine, lab.requests([lab.prompt("a", 5)], sampling))
    assert engine._scheduler._caches == caches


def test_an_arena_that_finds_no_memory_tells_every_caller_and_leaves_an_engine_that_works(
    lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = as_on_a_gpu(lab.engine(replace(lab.model(), stop_token_ids=())))
    requests = lab.requests([lab.prompt("a", 5), lab.prompt("b", 5)], [SamplingParams(max_tokens=8)] * 2)
    make = ArenaCache._empty

    def empty(cache: ArenaCache, lanes: int, tokens: int) -> torch.Tensor:
        if tokens:
            raise torch.OutOfMemoryError("out of memory")
        return make(cache, lanes, tokens)

    monkeypatch.setattr(ArenaCache, "_empty", empty)

    async def collect() -> object:
        return await asyncio.wait_for(lab.collect(engine, requests), 20)

    with pytest.raises(torch.OutOfMemoryError):
        asyncio.run(collect())
    assert not engine._scheduler.busy
    monkeypatch.setattr(ArenaCache, "_empty", make)
    assert len(lab.run(engine, requests)) == 4
