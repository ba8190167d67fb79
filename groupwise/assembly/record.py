"""What of a run outlives its process: evaluations, the state to go on from, the summary."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from groupwise.checkpoint import mark_best
from groupwise.config import Config
from groupwise.evaluation.report import EvalReport
from groupwise.files import append_rows
from groupwise.resume import Identity, Start
from groupwise.rundir import RunDirectory
from groupwise.train import TrainParts
from groupwise.trajectories import eval_to_json


@dataclass(slots=True)
class Reports:
    """Evaluations of one run, first to last; their rows go to trajectories."""

    run: RunDirectory
    summaries: list[dict[str, Any]] = field(default_factory=list)

    def add(self, step: int, report: EvalReport) -> None:
        self.summaries.append({"step": step, **report.summary()})
        append_rows(self.run.eval_file(step), map(eval_to_json, report.records()))

    def state_dict(self) -> dict[str, Any]:
        return {"summaries": list(self.summaries)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.summaries = list(state["summaries"])


def restore(parts: TrainParts, start: Start) -> int:
    """Load the checkpoint to start from, and forget what was written after it."""
    if start.checkpoint is None:
        return 0
    step = start.checkpoint.load(
        parts.saver.parts, optional=sorted({"reports", "progress", "empty", "doctor"} & set(parts.saver.parts))
    )
    mark_best(parts.run.checkpoints, parts.evaluator.best.step)
    parts.source.resumed()
    parts.run.truncate_after(step)
    if start.changes:
        parts.saver.save(step)  # the next resume compares with what was accepted
    return step


def summarize(
    config: Config, identity: Identity, *, steps: int, seconds: float, found: dict[str, Any]
) -> dict[str, Any]:
    """What `summary.json` holds; `found` is the run's own."""
    summary: dict[str, Any] = {"steps": steps, "seconds": round(seconds, 1), "seed": config.train.seed, **found}
    if identity.accepted:
        summary["accepted_changes"] = identity.accepted
    return summary
