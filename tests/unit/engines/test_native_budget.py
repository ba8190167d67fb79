"""The arithmetic of the KV caches' memory."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from groupwise.engines.native.budget import CacheBudget, Demand
from groupwise.engines.native.cache import CacheShape


@dataclass(frozen=True)
class Cache:
    lanes: int
    tokens: int


def shape(*, fixed: bool = False) -> CacheShape:
    return CacheShape(2, 2, 16, torch.float32, torch.device("cpu"), fixed=fixed, graphs=False)


NOTHING = (Cache(0, 0), Cache(0, 0))
LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=20)


@given(prompts=LENGTHS, samples=LENGTHS)
def test_what_is_needed_has_room_for_all(prompts: list[int], samples: list[int]) -> None:
    for_prompts, for_samples = CacheBudget(shape(), 1).needed(prompts=prompts, samples=samples)
    assert for_prompts.lanes >= len(prompts)
    assert for_prompts.tokens >= max(prompts)
    assert for_samples.lanes >= len(samples)
    assert for_samples.tokens >= max(samples)


@given(prompts=LENGTHS, samples=LENGTHS, most=st.integers(1, 20_000))
def test_caches_that_hold_nothing_need_what_is_needed(prompts: list[int], samples: list[int], most: int) -> None:
    budget = CacheBudget(shape(), most)
    needed = budget.needed(prompts=prompts, samples=samples)
    assert budget.fits(NOTHING, needed, live=False) == (sum(demand.size for demand in needed) <= most)


@pytest.mark.parametrize(
    ("held", "needed", "most", "fits"),
    [
        ((Cache(2, 64), Cache(4, 64)), (Demand(2, 64), Demand(4, 64)), 384, True),
        ((Cache(2, 64), Cache(4, 64)), (Demand(1, 64), Demand(8, 64)), 384, False),
        ((Cache(2, 64), Cache(4, 64)), (Demand(1, 64), Demand(8, 64)), 640, True),  # it never shrinks: 2 x 64 stay
        ((Cache(2, 64), Cache(4, 128)), (Demand(2, 64), Demand(8, 64)), 1151, False),  # lanes grow at the old length
        ((Cache(2, 64), Cache(4, 128)), (Demand(2, 64), Demand(8, 64)), 1152, True),
    ],
)
def test_caches_that_hold_something_only_grow(
    held: tuple[Cache, Cache], needed: tuple[Demand, Demand], most: int, fits: bool
) -> None:
    assert CacheBudget(shape(), most).fits(held, needed, live=True) is fits


def test_an_arena_that_grows_exists_twice() -> None:
    held, needed = (Cache(2, 64), Cache(4, 64)), (Demand(2, 64), Demand(8, 64))
    assert CacheBudget(shape(fixed=True), 384 + 512).fits(held, needed, live=True)
    assert not CacheBudget(shape(fixed=True), 384 + 511).fits(held, needed, live=True)
    assert CacheBudget(shape(fixed=True), 384).fits(held, (Demand(2, 64), Demand(4, 64)), live=True)


def test_room_is_what_the_caches_leave() -> None:
    assert CacheBudget(shape(), 1000).room((Cache(2, 64), Cache(4, 64))) == 1000 - 384


def test_empty_caches_begin_anew_where_growing_would_be_too_much() -> None:
    needed = (Demand(1, 128), Demand(2, 64))
    assert CacheBudget(shape(), 300).begins_anew((Cache(4, 64), Cache(4, 64)), needed)
    assert not CacheBudget(shape(), 1000).begins_anew((Cache(4, 64), Cache(4, 64)), needed)
    assert CacheBudget(shape(fixed=True), 1000).begins_anew((Cache(4, 64), Cache(4, 64)), needed)
