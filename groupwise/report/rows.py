"""Every rollout of a run in a few numbers, and where its row is, so that one that is looked at can be read whole."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

from groupwise.trajectories import FOLDER

_STEP_FILE = re.compile(r"step_(\d+)\.jsonl")
_TOKENS = b', "token_ids": ['
"""From here on a row is as long as its answer; a quote inside a text is escaped, so no text holds this."""


@dataclass(slots=True)
class GroupEntry:
    """A group of a step, `[S]` values for its samples in the order of the file.

    Attributes:
        at: where their rows begin in the step's file, in bytes.
        size: of their rows together, in bytes.
        rewards: None where no function gave a value.
        lengths: tokens that the model wrote.
        ends: `stop`, `length`, …; `failed` where the rollout did.
    """

    step: int
    group: int
    uid: str
    prompt: int
    source: str
    draw: int | None
    at: list[int] = field(default_factory=list[int])
    size: int = 0
    rewards: list[float | None] = field(default_factory=list["float | None"])
    lengths: list[int] = field(default_factory=list[int])
    ends: list[str] = field(default_factory=list[str])

    @property
    def known(self) -> list[float]:
        return [reward for reward in self.rewards if reward is not None]

    @property
    def mean(self) -> float:
        return sum(self.known) / len(self.known) if self.known else 0.0

    @property
    def spread(self) -> float:
        return max(self.known) - min(self.known) if self.known else 0.0


@dataclass(slots=True)
class RolloutIndex:
    """All groups of a run so far. `refresh` reads what was written since; what a killed run takes back, `generation`
    says.

    Attributes:
        prompts: each rendered prompt once.
        damaged: lines that are no rows.
    """

    run: Path
    groups: list[GroupEntry] = field(default_factory=list[GroupEntry])
    prompts: list[str] = field(default_factory=list[str])
    generation: int = 0
    damaged: int = 0
    _numbers: dict[str, int] = field(default_factory=dict[str, int])
    _read: dict[int, int] = field(default_factory=dict[int, int])

    def file(self, step: int) -> Path:
        return self.run / FOLDER / f"step_{step:06d}.jsonl"

    def refresh(self) -> None:
        """Read on. A file that has become shorter, or is gone, was written by a run that was killed: all begins
        again."""
        found = dict(sorted(self._files()))
        if any(found.get(step, -1) < read for step, read in self._read.items()):
            self.groups, self.prompts, self._numbers, self._read = [], [], {}, {}
            self.generation += 1
        for step, size in found.items():
            if size > self._read.get(step, 0):
                self._read[step] = self._scan(step, self._read.get(step, 0))

    def _files(self) -> Iterator[tuple[int, int]]:
        try:
            with os.scandir(self.run / FOLDER) as entries:
                for entry in entries:
                    if match := _STEP_FILE.fullmatch(entry.name):
                        yield int(match[1]), entry.stat().st_size
        except OSError:
            return

    def _scan(self, step: int, start: int) -> int:
        """Up to the last whole line; returns its end."""
        by_number = {entry.group: entry for entry in self.groups[-4096:] if entry.step == step} if start else {}
        with self.file(step).open("rb") as lines:
            lines.seek(start)
            for line in lines:
                if not line.endswith(b"\n"):
                    break
                row = light(line)
                if row is None:
                    self.damaged += 1
                else:
                    self._add(step, row, start, len(line), by_number)
                start += len(line)
        return start

    def _add(self, step: int, row: Mapping[str, Any], at: int, size: int, by_number: dict[int, GroupEntry]) -> None:
        group = row["group"]
        entry = by_number.get(group)
        if entry is None:
            entry = by_number[group] = GroupEntry(
                step, group, row["uid"], self._number_of(row["prompt"]), row["data_source"], row.get("draw")
            )
            self.groups.append(entry)
        entry.at.append(at)
        entry.size += size
        reward = row.get("reward")
        entry.rewards.append(None if reward is None else float(reward))
        entry.lengths.append(row["completion_tokens"])
        entry.ends.append("failed" if row["status"] != "ok" else row["finish_reason"])

    def _number_of(self, prompt: str) -> int:
        number = self._numbers.setdefault(prompt, len(self.prompts))
        if number == len(self.prompts):
            self.prompts.append(prompt)
        return number

    def read(self, entry: GroupEntry) -> list[dict[str, Any]]:
        """The rows of a group, whole. What is no longer there, or damaged, is left out."""
        rows: list[dict[str, Any]] = []
        try:
            with self.file(entry.step).open("rb") as file:
                for at in entry.at:
                    file.seek(at)
                    row = _object(file.readline())
                    if row is not None:
                        rows.append(row)
        except OSError:
            pass
        return rows


_NEEDED = {
    "group": int, "uid": str, "prompt": str, "data_source": str, "completion_tokens": int, "status": str,
    "finish_reason": str,
}  # fmt: skip


def light(line: bytes) -> dict[str, Any] | None:
    """A row without its tokens; None for a line that is no row."""
    cut = line.find(_TOKENS)
    row = _object(line[:cut] + b"}" if cut > 0 else line)
    if row is None and cut > 0:
        row = _object(line)
    if row is None or any(not isinstance(row.get(name), kind) for name, kind in _NEEDED.items()):
        return None
    return row if isinstance(row.get("reward"), int | float | None) else None


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def columns(index: RolloutIndex, entries: Sequence[GroupEntry], known_prompts: int = 0) -> dict[str, Any]:
    """JSON-ready: one list for each value, samples of all groups one behind another.

    Args:
        known_prompts: prompts before this one are known already; the first characters that all have in common, and
            the last, are left out of labels.
    """
    ends = sorted({end for entry in entries for end in entry.ends})
    number = {end: i for i, end in enumerate(ends)}
    return {
        "step": [entry.step for entry in entries],
        "group": [entry.group for entry in entries],
        "uid": [entry.uid for entry in entries],
        "prompt": [entry.prompt for entry in entries],
        "source": [entry.source for entry in entries],
        "samples": [len(entry.rewards) for entry in entries],
        "rewards": [reward for entry in entries for reward in entry.rewards],
        "lengths": [length for entry in entries for length in entry.lengths],
        "ends": [number[end] for entry in entries for end in entry.ends],
        "end_names": ends,
        "first_prompt": known_prompts,
        "labels": labels(index.prompts, known_prompts),
    }


LABEL = 240
"""Characters of a prompt in the list of groups."""


def labels(prompts: Sequence[str], start: int = 0) -> list[str]:
    """What tells prompts apart, in so many characters: a template's words around all of them are left out."""
    if not prompts:
        return []
    head = _num_common(prompts) if len(prompts) > 1 else 0
    tail = _num_common([text[::-1] for text in prompts]) if len(prompts) > 1 else 0
    shown: list[str] = []
    for prompt in prompts[start:]:
        begin = _word_start(prompt, head)
        end = _word_end(prompt, max(begin, len(prompt) - tail))
        shown.append(" ".join(prompt[begin : min(end, begin + 4 * LABEL)].split())[:LABEL])
    return shown


def _num_common(texts: Sequence[str]) -> int:
    """First characters that all have: those of the least and the greatest."""
    pairs = zip(min(texts), max(texts), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _word_start(text: str, at: int) -> int:
    """The beginning of the word that `at` is in: prompts share its first letters."""
    while at > 0 and not text[at - 1].isspace():
        at -= 1
    return at


def _word_end(text: str, at: int) -> int:
    while 0 < at < len(text) and not (text[at].isspace() or text[at - 1].isspace()):
        at += 1
    return at
