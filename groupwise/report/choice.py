"""Which groups a page keeps whole, when it cannot keep all: by a rule that it states, and the same ones each time."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from groupwise.report.rows import GroupEntry

_PER_STEP = ("widest", "worst", "best", "longest")
_FOLLOWED = 12
"""Prompts that are kept at each of their draws."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What is kept.

    Attributes:
        kept: in order of the run.
        rule: what to say of it.
    """

    kept: tuple[GroupEntry, ...]
    rule: str


def choose_groups(groups: Sequence[GroupEntry], room: int | None) -> Choice:
    """As many groups as fit into `room` bytes of rows, None being all.

    First what says most of the first and the last step; then the prompts that were drawn most often, each time; then of
    each step its group with the widest spread of rewards, then its worst, its best, its longest, then the others. Steps
    come in an order that is spread evenly over the run wherever it ends.
    """
    total = sum(entry.size for entry in groups)
    if room is None or total <= room:
        return Choice(tuple(groups), f"all {len(groups)} groups are here, with every token")
    kept: dict[int, GroupEntry] = {}
    left = room
    for entry in _by_worth(groups):
        if id(entry) not in kept and entry.size <= left:
            kept[id(entry)] = entry
            left -= entry.size
        if left < total // (len(groups) * 4):
            break
    steps = {entry.step for entry in kept.values()}
    rule = (
        f"{len(kept)} of {len(groups)} groups, in {len(steps)} of {len({entry.step for entry in groups})} steps, are "
        "here with their texts and tokens: prompts that were drawn most often, and of each step its widest spread of "
        "rewards, then its worst, its best and its longest group, in steps spread evenly over the run, while there is "
        "room. Of all others, prompt, rewards and lengths are here. groupwise report --all keeps everything"
    )
    return Choice(tuple(entry for entry in groups if id(entry) in kept), rule)


def _by_worth(groups: Sequence[GroupEntry]) -> Iterator[GroupEntry]:
    of_step: dict[int, list[GroupEntry]] = defaultdict(list)
    for entry in groups:
        of_step[entry.step].append(entry)
    order = [sorted(of_step)[place] for place in spread_order(len(of_step))]
    ranked = {step: _ranked(some) for step, some in of_step.items()}
    for step in order[:2]:
        yield from ranked[step][: len(_PER_STEP)]
    yield from _followed(groups)
    for rank in range(max(map(len, ranked.values()), default=0)):
        for step in order:
            if rank < len(ranked[step]):
                yield ranked[step][rank]


def _ranked(groups: Sequence[GroupEntry]) -> list[GroupEntry]:
    """Of one step: the four that say most, each once, then the others as they came."""
    first = [
        max(groups, key=lambda entry: entry.spread),
        min(groups, key=lambda entry: entry.mean),
        max(groups, key=lambda entry: entry.mean),
        max(groups, key=lambda entry: max(entry.lengths, default=0)),
    ]
    return list({id(entry): entry for entry in [*first, *groups]}.values())


def _followed(groups: Sequence[GroupEntry]) -> Iterator[GroupEntry]:
    """All draws of the prompts that came most often, where any came again."""
    often = [uid for uid, count in Counter(entry.uid for entry in groups).most_common(_FOLLOWED) if count > 1]
    for uid in often:
        yield from (entry for entry in groups if entry.uid == uid)


def spread_order(count: int) -> list[int]:
    """Places 0 to count - 1: the first, the last, then always the middle of the widest gap, so that any beginning of
    the list is spread evenly.

    Example:
        >>> spread_order(5)
        [0, 4, 2, 1, 3]
    """
    if count < 3:
        return list(range(count))
    order, gaps = [0, count - 1], [(0, count - 1)]
    while gaps:
        wider: list[tuple[int, int]] = []
        for low, high in gaps:
            if high - low > 1:
                middle = (low + high) // 2
                order.append(middle)
                wider += [(low, middle), (middle, high)]
        gaps = wider
    return order
