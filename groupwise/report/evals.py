"""A run's evaluations row by row: what became right, and what became wrong."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from groupwise.accuracy import accuracy, confidence_interval, paired
from groupwise.errors import GroupwiseError
from groupwise.report.choice import spread_order
from groupwise.report.rows import LABEL, labels, sizes_of
from groupwise.trajectories import numbered_files, read_eval_trajectories
from groupwise.trajectories.rows import EvalTrajectoryRow


@dataclass(slots=True)
class Evaluations:
    """All evaluations of a run so far; `refresh` reads those that are new.

    Attributes:
        outcomes: by step, by uid, whether each sample was right.
        prompts: by uid.
        damaged: by step, why its file cannot be read whole, or why it says nothing.
        version: another number whenever something changed.
    """

    run: Path
    outcomes: dict[int, dict[str, list[bool]]] = field(default_factory=dict[int, dict[str, list[bool]]])
    prompts: dict[str, str] = field(default_factory=dict[str, str])
    damaged: dict[int, str] = field(default_factory=dict[int, str])
    version: int = 0
    _sizes: dict[int, int] = field(default_factory=dict[int, int])

    def refresh(self) -> None:
        """Read the files that are new, or of another size than before; forget those that are gone."""
        found = sizes_of(numbered_files(self.run, "eval"))
        if found == self._sizes:
            return
        self.version += 1
        for step in self._sizes.keys() | found.keys():
            if found.get(step) != self._sizes.get(step):
                self.outcomes.pop(step, None)
                self.damaged.pop(step, None)
                if step in found:
                    self._read(step)
        self._sizes = found

    def _read(self, step: int) -> None:
        rows: dict[str, list[bool]] = {}
        measured = False
        try:
            for row in read_eval_trajectories(self.run, [step]):
                measured = measured or row.status == "ok"
                rows.setdefault(row.uid, []).append(row.correct)
                self.prompts.setdefault(row.uid, row.prompt)
        except GroupwiseError as error:
            self.damaged[step] = str(error)
        if measured:
            self.outcomes[step] = rows
        elif rows:
            self.damaged.setdefault(step, f"evaluation of step {step}: every sample failed, so nothing was measured")

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
            "problems": list(self.damaged.values()),
            "version": self.version,
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

    def answers(self, uid: str) -> dict[str, Any]:
        """One row as `texts` has it, with every answer; without any where there is no such row."""
        found: dict[str, Any] = {"prompt": self.prompts.get(uid, ""), "answers": {}}
        for step in self.steps if uid in self.prompts else ():
            given = [_answer(row) for row in self._rows(step) if row.uid == uid]
            if given:
                found["answers"][str(step)] = given
        return found

    def _rows(self, step: int) -> Iterator[EvalTrajectoryRow]:
        try:
            yield from read_eval_trajectories(self.run, [step])
        except GroupwiseError:
            return


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
