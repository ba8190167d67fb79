"""The arithmetic of memory: what the KV caches of prompts and samples need, and whether it stays under the bound.

All sizes are in tokens, of which each has `CacheShape.bytes_per_token`. A cache is a rectangle of lanes and tokens, and
never shrinks while it holds something.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from groupwise.engines.native.cache import CacheShape


class Sized(Protocol):
    """A cache, as far as its size matters."""

    @property
    def lanes(self) -> int: ...

    @property
    def tokens(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Demand:
    """Lanes that a cache needs, and tokens of each."""

    lanes: int
    tokens: int

    @property
    def size(self) -> int:
        return self.lanes * self.tokens


@dataclass(frozen=True, slots=True)
class CacheBudget:
    """The bound of both caches together.

    Attributes:
        most: tokens.

    Example:
        budget = CacheBudget(shape, most=4096)
        needed = budget.needed(prompts=[66, 5], samples=[130, 130, 90])
        budget.fits((prompt_cache, sample_cache), needed, live=True)
    """

    shape: CacheShape
    most: int

    def needed(self, *, prompts: Sequence[int], samples: Sequence[int]) -> tuple[Demand, Demand]:
        """Of the prompts' cache and of the samples', for prompts and samples of these lengths."""
        shape = self.shape
        return (
            Demand(shape.prompts_for(len(prompts)), shape.capacity(max(prompts))),
            Demand(shape.lanes_for(len(samples)), shape.capacity(max(samples))),
        )

    @staticmethod
    def held(caches: Sequence[Sized]) -> int:
        """What the caches are now."""
        return sum(cache.lanes * cache.tokens for cache in caches)

    def room(self, caches: Sequence[Sized]) -> int:
        """What is left beside them."""
        return self.most - self.held(caches)

    def fits(self, caches: Sequence[Sized], needed: Sequence[Demand], *, live: bool) -> bool:
        """Whether the bound would be kept.

        Args:
            live: the caches hold something, so they cannot begin anew, and what they have is there beside what is
                needed. An arena that grows then exists twice for a moment.
        """
        if not live:
            return sum(demand.size for demand in needed) <= self.most
        grown = self._grown(caches, needed)
        total = sum(demand.size for demand in grown)
        if self.shape.fixed and total > self.held(caches):
            twice = [demand.size for cache, demand in zip(caches, grown, strict=True) if demand.size > _size(cache)]
            total = self.held(caches) + sum(twice)
        return total <= self.most

    def begins_anew(self, caches: Sequence[Sized], needed: Sequence[Demand]) -> bool:
        """Whether caches that hold nothing are made again rather than grown: their rectangles together would be over
        the bound, or an arena would have to move."""
        grown = sum(demand.size for demand in self._grown(caches, needed))
        return grown > self.most or (self.shape.fixed and grown > self.held(caches))

    @staticmethod
    def _grown(caches: Sequence[Sized], needed: Sequence[Demand]) -> list[Demand]:
        return [
            Demand(max(cache.lanes, demand.lanes), max(cache.tokens, demand.tokens))
            for cache, demand in zip(caches, needed, strict=True)
        ]


def _size(cache: Sized) -> int:
    return cache.lanes * cache.tokens
