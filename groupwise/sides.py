"""What an engine tells beside the tokens of a turn, so that the trainer can compute what was really computed: which
experts were chosen (`Routes`), and which tokens the next one was drawn from (`Kept`).

Held as bytes: a mixture of 48 layers and 8 choices has 384 numbers per token, and a number in a tuple takes 8 bytes
more. They are no part of equality, and in no ledger, trajectory or JSON.

Shapes: T tokens of a turn or of a rollout, P of its prompt; L layers that have experts, k choices in each.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from typing import Literal, TypeAlias

ExpertType: TypeAlias = Literal["uint8", "int16"]
"""Of the number of an expert, little-endian: the first for up to 256 of them."""

MOST_EXPERTS = 1 << 15
NUMPY_TYPES: Mapping[ExpertType, str] = {"uint8": "<u1", "int16": "<i2"}
_BYTES: dict[ExpertType, int] = {"uint8": 1, "int16": 2}


@dataclass(frozen=True, slots=True)
class Routes:
    """Which experts were chosen, `[rows][L][k]`: one row for each token that was run, the last one of all was not.

    Attributes:
        data: the numbers, row after row.
        layers: L, those that have experts; k: choices.
        first: position of the first token that has a row, counted from the prompt's first.

    Example:
        Routes(bytes([0, 3, 1, 2]), "uint8", layers=1, k=2).rows == 2
    """

    data: bytes = field(compare=False, repr=False)
    dtype: ExpertType
    layers: int
    k: int
    first: int = 0

    @property
    def row_bytes(self) -> int:
        return self.layers * self.k * _BYTES[self.dtype]

    @property
    def rows(self) -> int:
        return len(self.data) // self.row_bytes

    @property
    def end(self) -> int:
        """The position behind the last row's."""
        return self.first + self.rows

    def part(self, start: int, stop: int) -> memoryview:
        """The rows of positions `start` up to `stop`."""
        assert self.first <= start <= stop <= self.end, f"rows {start} to {stop} of {self.first} to {self.end}"
        size = self.row_bytes
        return memoryview(self.data)[(start - self.first) * size : (stop - self.first) * size]

    def with_beginning(self, other: Routes, stop: int) -> Routes:
        """With another's rows for the positions before `stop`."""
        return replace(self, data=b"".join([other.part(0, stop), self.part(stop, self.end)]), first=0)


@dataclass(frozen=True, slots=True)
class Mixture:
    """The routers of a model, all of one kind.

    Attributes:
        depth: decoder layers, those without experts included.
        sparse: the numbers of those that have experts, L of them.
        experts: of a layer; k: of a token.
    """

    depth: int
    sparse: tuple[int, ...]
    experts: int
    k: int

    def __post_init__(self) -> None:
        assert 0 < self.k <= self.experts and self.sparse, f"{self.k} of {self.experts} experts, in {self.sparse}"


def expert_type(experts: int) -> ExpertType:
    """The narrowest for numbers from 0 up to `experts`.

    Raises:
        ValueError: there are more than any mixture has.
    """
    if experts > MOST_EXPERTS:
        raise ValueError(f"{experts:,} experts; at most {MOST_EXPERTS:,} can be told apart")
    return "uint8" if experts <= 256 else "int16"


@dataclass(frozen=True, slots=True)
class Kept:
    """The tokens that each one was drawn from, as filters (top-k, top-p, min-p) left them.

    Attributes:
        lengths: `[T]` int32, how many were left; 0 says that nothing was cut.
        ids: int32, theirs, token after token.

    Example:
        Kept.of([(3, 7), (), (5,)]).sizes == (2, 0, 1)
    """

    lengths: bytes = field(compare=False, repr=False)
    ids: bytes = field(compare=False, repr=False)

    @staticmethod
    def of(rows: Iterable[Sequence[int]]) -> Kept:
        """Of `[T]` sets of token ids."""
        lengths, ids = array("i"), array("i")
        for row in rows:
            lengths.append(len(row))
            ids.extend(row)
        return Kept(_little(lengths), _little(ids))

    @staticmethod
    def none(tokens: int) -> Kept:
        """Nothing was cut."""
        return Kept(bytes(4 * tokens), b"")

    def __add__(self, other: Kept) -> Kept:
        """Those of the tokens that follow, too."""
        return Kept(self.lengths + other.lengths, self.ids + other.ids)

    @property
    def sizes(self) -> tuple[int, ...]:
        """`[T]`."""
        return tuple(_numbers(self.lengths))

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        """The tokens that were left, `[T]` times."""
        ids = _numbers(self.ids)
        for start, stop in pairwise(accumulate(self.sizes, initial=0)):
            yield tuple(ids[start:stop])


@dataclass(frozen=True, slots=True)
class Sides:
    """What is known of a turn, or of all that follows a prompt, beside its tokens; None where nothing was asked for.

    Attributes:
        routes: of a rollout, `[P + T - 1]` rows; of a turn those that earlier turns did not have.
        kept: `[T]`.
    """

    routes: Routes | None = field(default=None, compare=False)
    kept: Kept | None = field(default=None, compare=False)

    def __bool__(self) -> bool:
        return self.routes is not None or self.kept is not None


NO_SIDES = Sides()


@dataclass(frozen=True, slots=True)
class Stretch:
    """A stretch of a rollout: T tokens, by the model or not, and what is known beside them."""

    tokens: int
    drawn: bool
    sides: Sides


def joined(stretches: Sequence[Stretch]) -> Sides:
    """Of stretches that follow each other, what is known of all; nothing where one of the model's lacks it.

    A turn has no row for its last token, which was not run yet; the next turn's first row is that one's.
    """
    drawn = [stretch.sides for stretch in stretches if stretch.drawn]
    routes = [sides.routes for sides in drawn if sides.routes is not None]
    known = drawn and len(routes) == len(drawn)
    cut = bool(drawn) and all(sides.kept is not None for sides in drawn)
    return Sides(_joined_routes(routes) if known else None, _joined_kept(stretches) if cut else None)


def _joined_routes(routes: Sequence[Routes]) -> Routes:
    if len(routes) == 1:
        return routes[0]
    for before, after in pairwise(routes):
        assert after.first == before.end, f"a turn's routes begin at {after.first}, the one before ends at {before.end}"
    return replace(routes[0], data=b"".join(part.data for part in routes))


def _joined_kept(stretches: Sequence[Stretch]) -> Kept:
    parts = [stretch.sides.kept or Kept.none(stretch.tokens) for stretch in stretches]
    return parts[0] if len(parts) == 1 else Kept(b"".join(p.lengths for p in parts), b"".join(p.ids for p in parts))


def _little(numbers: array[int]) -> bytes:
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers.tobytes()


def _numbers(data: bytes) -> array[int]:
    numbers = array("i", data)
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers
