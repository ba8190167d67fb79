"""What the built-in engine's caches will be, asked of the engine's own budget."""

from __future__ import annotations

import torch

from groupwise.engines.native.budget import CacheBudget
from groupwise.engines.native.cache import CacheShape
from groupwise.plan.facts import Load, ModelFacts, Setup
from groupwise.plan.memory import PREFILL_TOKENS, Sampling


def cache_shape(facts: ModelFacts, setup: Setup) -> CacheShape:
    dtype = torch.bfloat16 if setup.each == 2 else torch.float32
    gpu = setup.on_gpu
    # Its kernels read an arena, in graphs; sizes alone are asked for, so the device is none.
    return CacheShape(
        facts.layers,
        facts.key_heads,
        facts.head_size,
        dtype,
        torch.device("meta"),
        fixed=gpu,
        graphs=gpu,
        by_kernel=gpu,
    )


def most_lanes(shape: CacheShape, load: Load, budget: int, *, at_most: int) -> int:
    """Samples that the engine decodes together, of at most so many; 0 where not one has room.

    Args:
        budget: bytes of both caches.
    """
    bound = CacheBudget(shape, budget // shape.bytes_per_token)
    few, many = 0, min(at_most, load.samples)
    while few < many:
        middle = (few + many + 1) // 2
        if cache_tokens(bound, load, middle) <= bound.most:
            few = middle
        else:
            many = middle - 1
    return few


def cache_tokens(budget: CacheBudget, load: Load, lanes: int) -> int:
    """Of the two rectangles: prompts by the longest prompt, samples by the longest answer. Groups stand in order, so
    that at most one at either end of those that run is not whole."""
    prompts = min(load.prompts, -(-lanes // load.group) + int(lanes < load.samples))
    needed = budget.needed(prompts=[load.longest_prompt] * prompts, samples=[load.longest_answer] * lanes)
    return sum(demand.size for demand in needed)


def find_sampling(facts: ModelFacts, setup: Setup, loads: list[Load], budget: int, *, at_most: int) -> Sampling:
    """The largest of what training and evaluation ask for: caches do not shrink.

    Args:
        loads: of a training step, and of an evaluation if there is one.
    """
    shape = cache_shape(facts, setup)
    bound = CacheBudget(shape, budget // shape.bytes_per_token)
    lanes = [most_lanes(shape, load, budget, at_most=at_most) for load in loads]
    tokens = [cache_tokens(bound, load, count) if count else 0 for load, count in zip(loads, lanes, strict=True)]
    prompts = [
        min(load.prompts, -(-count // load.group)) * load.prompt for load, count in zip(loads, lanes, strict=True)
    ]
    prefill = max(min(each, PREFILL_TOKENS + load.longest_prompt) for each, load in zip(prompts, loads, strict=True))
    return Sampling(lanes[0], max(tokens) * shape.bytes_per_token, prefill)
