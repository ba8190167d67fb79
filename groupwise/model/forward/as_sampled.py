"""How packed tokens were drawn, as tensors: the experts that the sampler chose, and the tokens that its filters left.

Shapes: N packed tokens, M predicted ones; L layers that have experts, k choices in each; V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from groupwise.batches import TrainingRow
from groupwise.sides import ExpertType, Kept

LEFT_OUT = -1e30
"""A logit whose token cannot be drawn: finite, so that 0 times it is 0, and far below all others in any type."""

_TYPES: dict[ExpertType, torch.dtype] = {"uint8": torch.uint8, "int16": torch.int16}


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of packed tokens: `length` of them from `start` on, at positions from `first` on of a row."""

    row: TrainingRow
    start: int
    first: int
    length: int


@dataclass(frozen=True, slots=True)
class ReplayedRoutes:
    """The experts of each packed token.

    Attributes:
        ids: `[N, L, k]`, uint8 or int16.
        given: `[N]` bool; where it is False, as of padding, the router chooses by itself.
    """

    ids: Tensor
    given: Tensor

    @staticmethod
    def of(spans: Sequence[Span], tokens: int) -> ReplayedRoutes | None:
        """Of N packed `tokens`; None where no row has any."""
        known = [routes for span in spans if (routes := span.row.sides.routes) is not None]
        if not known:
            return None
        shape = known[0]
        size, data = shape.row_bytes, bytearray(tokens * shape.row_bytes)
        given = torch.zeros(tokens, dtype=torch.bool)
        for span in spans:
            routes, stop = span.row.sides.routes, span.start + span.length
            if routes is None:
                continue
            assert (routes.dtype, routes.layers, routes.k) == (shape.dtype, shape.layers, shape.k), "of two mixtures"
            data[span.start * size : stop * size] = routes.part(span.first, span.first + span.length)
            given[span.start : stop] = True
        ids = torch.frombuffer(data, dtype=_TYPES[shape.dtype])
        return ReplayedRoutes(ids.view(tokens, shape.layers, shape.k), given)

    def to(self, device: torch.device) -> ReplayedRoutes:
        return ReplayedRoutes(self.ids.to(device, non_blocking=True), self.given.to(device, non_blocking=True))


@dataclass(frozen=True, slots=True)
class KeptTokens:
    """The tokens that each predicted one was drawn from.

    Attributes:
        ids: `[S]` int32, token after token.
        sizes: `[M]` int64, how many; 0: nothing was cut.
        starts: `[M + 1]`, where each one's begin, as plain numbers.
    """

    ids: Tensor
    sizes: Tensor
    starts: tuple[int, ...]

    @staticmethod
    def of(rows: Sequence[TrainingRow]) -> KeptTokens | None:
        """Row after row; None where nothing was cut in any."""
        if all(row.sides.kept is None for row in rows):
            return None
        kept = [row.sides.kept or Kept.none(len(row.follows)) for row in rows]
        lengths = torch.frombuffer(bytearray().join(part.lengths for part in kept), dtype=torch.int32).long()
        data = bytearray().join(part.ids for part in kept)
        ids = torch.frombuffer(data, dtype=torch.int32) if data else torch.empty(0, dtype=torch.int32)
        starts: list[int] = [0, *lengths.cumsum(0).tolist()]
        return KeptTokens(ids, lengths, tuple(starts))

    def to(self, device: torch.device) -> KeptTokens:
        return KeptTokens(self.ids.to(device, non_blocking=True), self.sizes.to(device, non_blocking=True), self.starts)

    def cut(self, logits: Tensor, first: int) -> Tensor:
        """`logits [m, V]` of the predicted tokens from `first` on, written over with `LEFT_OUT` where the sampler could
        not have drawn: their softmax is the distribution that it did draw from, and no gradient reaches the others."""
        last = first + logits.shape[0]
        sizes = self.sizes[first:last]
        rows = torch.arange(logits.shape[0], device=logits.device).repeat_interleave(
            sizes, output_size=self.starts[last] - self.starts[first]
        )
        out = (sizes > 0)[:, None].repeat(1, logits.shape[1])
        out[rows, self.ids[self.starts[first] : self.starts[last]].long()] = False
        return logits.masked_fill_(out, LEFT_OUT)


@dataclass(frozen=True, slots=True)
class AsSampled:
    """What a pass needs to compute tokens as the sampler did; None where it computes them as it would anyway."""

    routes: ReplayedRoutes | None = None
    kept: KeptTokens | None = None

    def to(self, device: torch.device) -> AsSampled:
        return AsSampled(
            None if self.routes is None else self.routes.to(device), None if self.kept is None else self.kept.to(device)
        )


NOTHING = AsSampled()
