"""One file of HTML from one run or several."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import Any

from groupwise import __version__
from groupwise.errors import ConfigError
from groupwise.files import write_text_atomic, writing
from groupwise.report.choice import Choice, choose_groups
from groupwise.report.detail import group_detail
from groupwise.report.evals import compared
from groupwise.report.facts import check_run
from groupwise.report.page import packed, page
from groupwise.report.reader import RunReader, names_of

ROOM = 16 * 2**20
"""Bytes of rows that a page keeps whole, unless it is to keep all: some 4 MB of it."""

_EVAL_SHARE = 6
"""Of the room, a sixth more is for evaluations' texts."""


@dataclass(frozen=True, slots=True)
class Report:
    """What was written.

    Attributes:
        size: in bytes.
        kept, groups: of all runs; `kept` have their texts and tokens in it.
    """

    path: Path
    size: int
    kept: int
    groups: int


def write_report(
    runs: Sequence[Path],
    out: Path,
    *,
    room: int | None = ROOM,
    say: Callable[[str], None] = lambda text: None,
) -> Report:
    """Read the runs, which may go on meanwhile, and write the page.

    Args:
        room: bytes of rollouts' rows that are kept whole, shared by the runs; None keeps all.
        say: told what is done, for what takes long.

    Raises:
        ConfigError: one of them is no run; one is named twice.
        FileError: the page cannot be written.

    Example:
        write_report([Path("runs/one")], Path("runs/one/report.html"))
    """
    for run in runs:
        check_run(run)
    if len({run.resolve() for run in runs}) < len(runs):
        raise ConfigError("a run is named twice; name each once")
    readers = [RunReader(run, name) for run, name in zip(runs, names_of(list(runs)), strict=True)]
    for reader in readers:
        say(f"reading {reader.run}")
        reader.refresh()
    shares = _shares([sum(entry.size for entry in reader.index.groups) for reader in readers], room)
    choices = [choose_groups(reader.index.groups, share) for reader, share in zip(readers, shares, strict=True)]
    text = "".join(page(" and ".join(reader.name for reader in readers), _parts(readers, choices, shares)))
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomic(out, text)
    return Report(
        out,
        out.stat().st_size,
        sum(len(choice.kept) for choice in choices),
        sum(len(reader.index.groups) for reader in readers),
    )


def _shares(needs: Sequence[int], room: int | None) -> list[int | None]:
    """Of the room, equal parts, and what one does not need is the others'."""
    if room is None:
        return [None] * len(needs)
    shares = [0] * len(needs)
    for left, number in enumerate(sorted(range(len(needs)), key=needs.__getitem__)):
        shares[number] = room // (len(needs) - left)
        room -= min(needs[number], shares[number])
    return list(shares)


def _parts(
    readers: Sequence[RunReader], choices: Sequence[Choice], shares: Sequence[int | None]
) -> Iterator[tuple[str, str]]:
    yield "head", packed(head(readers, rules=[choice.rule for choice in choices]))
    for number, (reader, choice, share) in enumerate(zip(readers, choices, shares, strict=True)):
        yield f"evals/{number}", packed(reader.evals.texts(None if share is None else share // _EVAL_SHARE))
        for step, entries in groupby(choice.kept, key=lambda entry: entry.step):
            details = [group_detail(reader.index, entry, reader.pieces) for entry in entries]
            yield f"groups/{number}/{step}", packed(details)


def head(readers: Sequence[RunReader], *, rules: Sequence[str]) -> dict[str, Any]:
    """What a page needs first; JSON-ready.

    Args:
        rules: by run, what of its groups is kept.
    """
    return {
        "format": 1,
        "groupwise": __version__,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "rules": list(rules),
        "runs": [reader.head() for reader in readers],
        "compared": [compared(readers[0].evals, other.evals) for other in readers[1:]],
    }
