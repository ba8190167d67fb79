"""Every rollout of a run in a few numbers, and where its row is, so that one that is looked at can be read whole."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

from groupwise.runs.reading import finite
from groupwise.trajectories import FOLDER, STEP_FILE, numbered_files

_TOKENS = (b',"token_ids":[', b', "token_ids": [')  # the second in rows of earlier releases
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
    _alike: Alike = field(default_factory=lambda: Alike())

    def file(self, step: int) -> Path:
        return self.run / FOLDER / STEP_FILE.format(step)

    def refresh(self) -> None:
        """Read on. A file that has become shorter, or is gone, was written by a run that was killed: all begins
        again."""
        found = sizes_of(numbered_files(self.run, "step"))
        if any(found.get(step, -1) < read for step, read in self._read.items()):
            self.groups, self.prompts, self._numbers, self._read = [], [], {}, {}
            self._alike, self.damaged = Alike(), 0
            self.generation += 1
        for step, size in found.items():
            if size > self._read.get(step, 0):
                self._read[step] = self._scan(step, self._read.get(step, 0))

    def _scan(self, step: int, start: int) -> int:
        """Up to the last whole line; returns its end."""
        by_number = {entry.group: entry for entry in self.groups[-4096:] if entry.step == step} if start else {}
        for line in self._lines(step, start):
            row = light(line)
            if row is None:
                self.damaged += 1
            else:
                self._add(step, row, start, len(line), by_number)
            start += len(line)
        return start

    def _lines(self, step: int, start: int = 0) -> Iterator[bytes]:
        """The whole ones, one at a time: an answer may be long, and a step has many."""
        try:
            with self.file(step).open("rb") as lines:
                lines.seek(start)
                yield from takewhile(lambda line: line.endswith(b"\n"), lines)
        except OSError:
            return

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
            self._alike.add(prompt)
        return number

    def labels(self, start: int = 0) -> list[str]:
        """Of the prompts from this one on."""
        return [self._alike.label(prompt) for prompt in self.prompts[start:]]

    def search(self, text: str) -> Iterator[tuple[int, int]]:
        """Step and number of the groups with a sample whose prompt or answer has the text in it, in lower case."""
        found: set[tuple[int, int]] = set()
        for step in list(self._read):
            for row in filter(None, map(light, self._lines(step))):
                place, said = (step, row["group"]), f"{row['prompt']}\n{row.get('completion', '')}"
                if place not in found and text in said.lower():
                    found.add(place)
                    yield place

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
    cut = max(map(line.find, _TOKENS))
    row = _object(line[:cut] + b"}" if cut > 0 else line)
    if row is None and cut > 0:
        row = _object(line)
    if row is None or any(not isinstance(row.get(name), kind) for name, kind in _NEEDED.items()):
        return None
    reward = row.get("reward")
    return row if reward is None or isinstance(reward, float) or finite(reward) is not None else None


def sizes_of(files: Mapping[int, Path]) -> dict[int, int]:
    """In bytes, of those that are still there."""
    found: dict[int, int] = {}
    for step, file in files.items():
        with suppress(OSError):
            found[step] = file.stat().st_size
    return found


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
        "labels": index.labels(known_prompts),
    }


LABEL = 240
"""Characters of a prompt in the list of groups."""


@dataclass(slots=True)
class Alike:
    """How many first and last characters prompts have in common: a template's words, which tell nothing.

    Example:
        "<user>How many apples?<end>" and "<user>How many pears?<end>" have 16 and 7; their labels are whole words,
        "apples?<end>" and "pears?<end>"
    """

    first: str | None = None
    head: int = 0
    tail: int = 0

    def add(self, prompt: str) -> None:
        if self.first is None:
            self.first, self.head, self.tail = prompt, len(prompt), len(prompt)
            return
        self.head = _num_common(self.first[: self.head], prompt)
        ends = (text[max(0, len(text) - self.tail) :][::-1] for text in (self.first, prompt))
        self.tail = _num_common(*ends)

    def label(self, prompt: str) -> str:
        """What tells it apart, whole words, up to `LABEL` characters."""
        begin, end = 0, len(prompt)
        if self.tail < len(self.first or ""):  # else it is the only one
            begin = _word_start(prompt, self.head)
            end = _word_end(prompt, max(begin, len(prompt) - self.tail))
        return " ".join(prompt[begin : min(end, begin + 4 * LABEL)].split())[:LABEL]


def labels(prompts: Iterable[str]) -> list[str]:
    """Of all of them."""
    alike, texts = Alike(), list(prompts)
    for text in texts:
        alike.add(text)
    return [alike.label(text) for text in texts]


def _num_common(one: str, other: str) -> int:
    """First characters that both have."""
    return len(os.path.commonprefix([one, other]))  # noqa: RUF071 - of texts, which is what it compares


def _word_start(text: str, at: int) -> int:
    """The beginning of the word that `at` is in: prompts share its first letters."""
    while at > 0 and not text[at - 1].isspace():
        at -= 1
    return at


def _word_end(text: str, at: int) -> int:
    while 0 < at < len(text) and not (text[at].isspace() or text[at - 1].isspace()):
        at += 1
    return at
