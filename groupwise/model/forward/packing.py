"""Rows of token ids become one packed sequence without padding, in which each group's prompt stands once.

    rows of group 0: (p0, c00) (p0, c01)      packed: [ p0 | p1 | c00 | c01 | c10 ]
    rows of group 1: (p1, c10)

Attention is causal inside every segment, and a completion sees its prompt before itself. A completion's last token is
left out: nothing is predicted from it. The length is rounded up to `ROW_MULTIPLE`, because matrix kernels give every
row the same bits only when rows come in full tiles (measured, for any number of CPU threads: multiples of 4 in
float32; in bfloat16 a layer of 32 by 16 has another kernel up to 8 rows).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from groupwise.batches import TrainingRow
from groupwise.inputs import ModelInput
from groupwise.model.forward.as_sampled import NOTHING, AsSampled, KeptTokens, ReplayedRoutes, Span

ROW_MULTIPLE = 16


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of tokens that attend to each other causally, and to all of `prefix` if there is one.

    Attributes:
        start, length: place in the packed sequence.
        prefix: index of the segment that comes before this one's first token, or None.
    """

    start: int
    length: int
    prefix: int | None = None

    @property
    def stop(self) -> int:
        return self.start + self.length


@dataclass(frozen=True, slots=True)
class Packed:
    """A packed sequence. N tokens (padding included), M predicted tokens, R rows.

    Attributes:
        token_ids, position_ids: `[N]` int64.
        segments: prompts first, then completions; segments with one `prefix` are neighbours.
        predictors: `[M]` int64, the packed position whose hidden state predicts each completion token.
        targets: `[M]` int64, the completion tokens themselves, row by row.
        row: `[M]` int64, the row that each belongs to, in the order in which rows were given.
        sampled: how the rows were drawn, where they say it.
    """

    token_ids: Tensor
    position_ids: Tensor
    segments: tuple[Segment, ...]
    predictors: Tensor
    targets: Tensor
    row: Tensor
    sampled: AsSampled = NOTHING

    def to(self, device: torch.device) -> Packed:
        move = [t.to(device, non_blocking=True) for t in (self.token_ids, self.position_ids)]
        rest = [t.to(device, non_blocking=True) for t in (self.predictors, self.targets, self.row)]
        return Packed(move[0], move[1], self.segments, rest[0], rest[1], rest[2], self.sampled.to(device))


class _Prompts:
    """Where each prompt of each group stands. Inputs are compared by digest, which is made where there is doubt."""

    def __init__(self) -> None:
        self._places: dict[int, list[tuple[ModelInput, int]]] = {}

    def find(self, row: TrainingRow) -> int | None:
        """The segment of the row's prompt."""
        known = self._places.get(row.group, ())
        return next((place for prompt, place in known if prompt is row.prompt or prompt == row.prompt), None)

    def add(self, row: TrainingRow, place: int) -> None:
        self._places.setdefault(row.group, []).append((row.prompt, place))


def pack(rows: Sequence[TrainingRow]) -> Packed:
    """Pack training rows; those of one group with equal prompts, which must be neighbours, share the prompt, and the
    experts that were chosen for the first one's.

    Example:
        Two rows of one group with prompt (1, 2, 3) and completions (7, 8) and (9,) pack to token_ids (1, 2, 3, 7),
        predictors (2, 3, 2) and targets (7, 8, 9).
    """
    tokens: list[int] = []
    positions: list[int] = []
    segments: list[Segment] = []
    spans: list[Span] = []
    prompts = _Prompts()
    for row in rows:
        if prompts.find(row) is None:
            prompts.add(row, len(segments))
            spans.append(Span(row, len(tokens), 0, len(row.prompt_ids)))
            segments.append(Segment(len(tokens), len(row.prompt_ids)))
            tokens.extend(row.prompt_ids)
            positions.extend(range(len(row.prompt_ids)))
    predictors: list[int] = []
    targets: list[int] = []
    owner: list[int] = []
    for index, row in enumerate(rows):
        place = prompts.find(row)
        assert place is not None, "the loop above placed every row's prompt"
        prompt = segments[place]
        length = len(row.token_ids) - 1
        predictors.append(prompt.stop - 1)
        predictors.extend(range(len(tokens), len(tokens) + length))
        targets.extend(row.token_ids)
        owner.extend([index] * len(row.token_ids))
        if length:
            spans.append(Span(row, len(tokens), prompt.length, length))
            segments.append(Segment(len(tokens), length, place))
            tokens.extend(row.token_ids[:-1])
            positions.extend(range(prompt.length, prompt.length + length))
    packed = _finish(tokens, positions, segments, predictors, targets, owner)
    if not any(row.sides for row in rows):
        return packed
    return replace(packed, sampled=AsSampled(ReplayedRoutes.of(spans, len(packed.token_ids)), KeptTokens.of(rows)))


def pack_sequences(sequences: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Packed:
    """Pack prompts, each with what follows it (or nothing), as the engine's prefill does. All of their tokens are
    computed; `predictors` holds each sequence's last position.

    Segments are one prompt for each sequence, in order, then what follows, for those that something follows.
    """
    tokens: list[int] = []
    positions: list[int] = []
    segments: list[Segment] = []
    for prompt, _ in sequences:
        segments.append(Segment(len(tokens), len(prompt)))
        tokens.extend(prompt)
        positions.extend(range(len(prompt)))
    last: list[int] = []
    for index, (prompt, following) in enumerate(sequences):
        if following:
            segments.append(Segment(len(tokens), len(following), index))
            tokens.extend(following)
            positions.extend(range(len(prompt), len(prompt) + len(following)))
        last.append(segments[-1].stop - 1 if following else segments[index].stop - 1)
    return _finish(tokens, positions, segments, last, [0] * len(last), list(range(len(last))))


def _finish(
    tokens: list[int],
    positions: list[int],
    segments: list[Segment],
    predictors: list[int],
    targets: list[int],
    owner: list[int],
) -> Packed:
    padding = -len(tokens) % ROW_MULTIPLE
    return Packed(
        token_ids=torch.tensor(tokens + [0] * padding),
        position_ids=torch.tensor(positions + [0] * padding),
        segments=tuple(segments),
        predictors=torch.tensor(predictors, dtype=torch.int64),
        targets=torch.tensor(targets, dtype=torch.int64),
        row=torch.tensor(owner, dtype=torch.int64),
    )


def pad_rows(x: Tensor, multiple: int = ROW_MULTIPLE) -> Tensor:
    """Zero rows added to `[M, …]` until M is a multiple of `multiple`."""
    missing = -x.shape[0] % multiple
    if not missing:
        return x
    return torch.cat([x, x.new_zeros(missing, *x.shape[1:])])
