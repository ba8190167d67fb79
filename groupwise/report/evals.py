"""A run's evaluations row by row: what became right, and what became wrong."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from groupwise.accuracy import accuracy, confidence_interval, paired
from groupwise.errors import GroupwiseError
from groupwise.report.choice import spread_order
from groupwise.report.rows import LABEL, labels
from groupwise.trajectories import FOLDER, read_eval_file
from groupwise.trajectories.rows import EvalTrajectoryRow

_EVAL_FILE = re.compile(r"eval_(\d+)\.jsonl")


@dataclass(slots=True)
class Evaluations:
    """All evaluations of a run so far; `refresh` reads those that are new.

    Attributes:
        outcomes: by step, by uid, whether each sample was right.
        prompts: by uid.
        damaged: of files that cannot be read, why.
    """

    run: Path
    outcomes: dict[int, dict[str, list[bool]]] = field(default_factory=dict[int, dict[str, list[bool]]])
    prompts: dict[str, str] = field(default_factory=dict[str, str])
    damaged: list[str] = field(default_factory=list[str])
    _sizes: dict[int, int] = field(default_factory=dict[int, int])

    def refresh(self) -> bool:
        """Whether anything changed."""
        found = dict(sorted(_files(self.run)))
        changed = [step for step, file in found.items() if self._sizes.get(step) != file.stat().st_size]
        gone = [step for step in self._sizes if step not in found]
        for step in gone:
            del self._sizes[step]
            self.outcomes.pop(step, None)
        for step in changed:
            self._sizes[step] = found[step].stat().st_size
            self._read(step, found[step])
        return bool(changed or gone)

    def _read(self, step: int, file: Path) -> None:
        rows: dict[str, list[bool]] = {}
        try:
            for row in read_eval_file(file):
                rows.setdefault(row.uid, []).append(row.correct)
                self.prompts.setdefault(row.uid, row.prompt)
        except GroupwiseError as error:
            self.damaged.append(str(error))
        if rows:
            self.outcomes[step] = rows

    @property
    def steps(self) -> list[int]:
        return sorted(self.outcomes)

    def record(self) -> dict[str, Any]:
        """JSON-ready: accuracy of each evaluation with its interval, and `[rows]` shares of right samples by step."""
        uids = list(self.prompts)
        points: list[dict[str, Any]] = []
        for step in self.steps:
            rows = list(self.outcomes[step].values())
            interval = confidence_interval(rows)
            points.append(
                {
                    "step": step,
                    "accuracy": accuracy(rows),
                    "low": interval.low,
                    "high": interval.high,
                    "rows": len(rows),
                }
            )
        return {
            "points": points,
            "uids": uids,
            "labels": labels(list(self.prompts.values())),
            "right": [[_share(self.outcomes[step].get(uid)) for uid in uids] for step in self.steps],
            "problems": self.damaged,
        }

    def texts(self, room: int | None) -> dict[str, Any]:
        """What was answered in the first and the last evaluation and between: by uid, then step. Rows whose judgement
        changed come first; while there is room (characters)."""
        wanted = set(self._by_worth(room))
        found: dict[str, dict[str, Any]] = {uid: {"prompt": self.prompts[uid], "answers": {}} for uid in wanted}
        left = room if room is not None else -1
        for place in spread_order(len(self.steps)):
            step = self.steps[place]
            for row in self._rows(step):
                if row.uid in wanted and (room is None or left > 0):
                    found[row.uid]["answers"].setdefault(str(step), []).append(_answer(row))
                    left -= len(row.text)
        return found

    def _by_worth(self, room: int | None) -> list[str]:
        if not self.steps:
            return []
        first, last = self.outcomes[self.steps[0]], self.outcomes[self.steps[-1]]
        uids = sorted(self.prompts, key=lambda uid: _share(first.get(uid)) == _share(last.get(uid)))
        if room is None:
            return uids
        kept, left = list[str](), room // 2
        for uid in uids:
            left -= len(self.prompts[uid]) + LABEL
            if left < 0:
                break
            kept.append(uid)
        return kept

    def _rows(self, step: int) -> Iterator[EvalTrajectoryRow]:
        try:
            yield from read_eval_file(self.run / FOLDER / f"eval_{step:06d}.jsonl")
        except GroupwiseError:
            return


def _files(run: Path) -> Iterator[tuple[int, Path]]:
    folder = run / FOLDER
    for file in folder.iterdir() if folder.is_dir() else ():
        if match := _EVAL_FILE.fullmatch(file.name):
            yield int(match[1]), file


def _share(samples: Sequence[bool] | None) -> float | None:
    return sum(samples) / len(samples) if samples else None


def _answer(row: EvalTrajectoryRow) -> dict[str, Any]:
    return {
        "text": row.text,
        "correct": row.correct,
        "reward": row.reward,
        "rewards": dict(row.rewards),
        "tokens": row.num_tokens,
        "finish": "failed" if row.status != "ok" else row.finish_reason,
        "cause": row.cause,
    }


def compared(first: Evaluations, second: Evaluations) -> dict[str, Any] | None:
    """The last evaluations of two runs over the rows that both have; None where they share none."""
    if not (first.steps and second.steps):
        return None
    before, after = first.outcomes[first.steps[-1]], second.outcomes[second.steps[-1]]
    uids = [uid for uid in before if uid in after and first.prompts[uid] == second.prompts[uid]]
    if not uids:
        return None
    found = paired([before[uid] for uid in uids], [after[uid] for uid in uids])
    shares: Mapping[str, tuple[float | None, float | None]] = {
        uid: (_share(before[uid]), _share(after[uid])) for uid in uids
    }
    return {
        "steps": [first.steps[-1], second.steps[-1]],
        "rows": found.rows,
        "better": found.better,
        "worse": found.worse,
        "p": found.p,
        "accuracy": [accuracy([before[uid] for uid in uids]), accuracy([after[uid] for uid in uids])],
        "differ": [{"uid": uid, "shares": pair} for uid, pair in shares.items() if pair[0] != pair[1]],
    }
