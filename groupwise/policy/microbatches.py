"""Rows into micro-batches: within a token budget, of about equal size, groups kept whole where they fit.

The split changes no gradient, because denominators are counted over the whole batch; it only decides time and memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from groupwise.batches import MiniBatch, TrainingRow
from groupwise.inputs import ModelInput


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Rows that go through the model in one pass.

    Attributes:
        backward: False for rows whose gradient is known to be zero: they are only measured.
    """

    rows: tuple[TrainingRow, ...]
    backward: bool = True


@dataclass(slots=True)
class _Bin:
    tokens: int = 0
    rows: list[TrainingRow] = field(default_factory=list)


def cut_batch(batch: MiniBatch, budget: int, *, streams: int = 1) -> tuple[MicroBatch, ...]:
    """The mini-batch as micro-batches, those that are only measured last; arguments as for `split_rows`."""
    return (
        *split_rows(batch.rows, budget, streams=streams),
        *split_rows(batch.measured, budget, streams=streams, backward=False),
    )


def split_rows(
    rows: Sequence[TrainingRow], budget: int, *, streams: int = 1, backward: bool = True
) -> tuple[MicroBatch, ...]:
    """Micro-batches of at most `budget` tokens each, a prompt counted once; a longer row stands alone.

    Pieces (whole groups, or parts of a group that is over the budget, or over a stream's share) go to the emptiest
    micro-batch, longest first.

    Args:
        streams: micro-batches computed at one time; as far as rows allow, it divides their number.
    """
    groups = _groups(rows)
    prompt = max((len(group[0].prompt_ids) for group in groups), default=0)  # a divided group computes its again
    share = -(-sum(map(_tokens, groups)) // streams) + prompt
    pieces = sorted(_pieces(groups, min(budget, share)), key=lambda piece: -_tokens(piece))
    alone = [piece for piece in pieces if _tokens(piece) > budget]
    shared = pieces[len(alone) :]
    count = -(-sum(map(_tokens, shared)) // (budget * streams)) * streams
    bins = _fill(shared, count)
    while any(b.tokens > budget for b in bins):
        count += streams
        bins = _fill(shared, count)
    # Two pieces of one group can meet in a bin; packing needs the rows of one prompt side by side.
    contents = [*alone, *(sorted(b.rows, key=_prompt_of) for b in bins if b.rows)]
    return tuple(MicroBatch(tuple(content), backward) for content in contents)


def _fill(pieces: Sequence[list[TrainingRow]], count: int) -> list[_Bin]:
    bins = [_Bin() for _ in range(count)]
    for piece in pieces:
        emptiest = min(bins, key=lambda b: b.tokens)
        emptiest.tokens += _tokens(piece)
        emptiest.rows.extend(piece)
    return bins


def _tokens(piece: Sequence[TrainingRow]) -> int:
    return len(piece[0].prompt_ids) + sum(len(row.token_ids) for row in piece)


def _prompt_of(row: TrainingRow) -> tuple[int, str]:
    return row.group, row.prompt.digest


def _groups(rows: Sequence[TrainingRow]) -> list[list[TrainingRow]]:
    groups: dict[tuple[int, ModelInput], list[TrainingRow]] = {}
    for row in rows:
        groups.setdefault((row.group, row.prompt), []).append(row)
    return list(groups.values())


def _pieces(groups: Sequence[list[TrainingRow]], budget: int) -> list[list[TrainingRow]]:
    pieces: list[list[TrainingRow]] = []
    for group in groups:
        piece: list[TrainingRow] = []
        for row in group:
            if piece and _tokens([*piece, row]) > budget:
                pieces.append(piece)
                piece = []
            piece.append(row)
        pieces.append(piece)
    return pieces
