"""What a run keeps of its samples: the rows of `trajectories/`, typed, with a reader that takes those of old runs too.

    step_000001.jsonl   a `TrajectoryRow` per rollout of training step 1
    eval_000001.jsonl   an `EvalTrajectoryRow` per sample of the evaluation after it

A row is one JSON object on a line of its own and says its format. Format 1, of rows that do not, knew no segments. A
segment's text and tokens are a stretch of the row's: a row holds each text and each number once. Experts that were
chosen (`Routes`) are never in it.
"""

from __future__ import annotations

from groupwise.trajectories.parsing import eval_from_json, from_json
from groupwise.trajectories.reading import (
    EVAL_FILE,
    FOLDER,
    STEP_FILE,
    numbered_files,
    read_eval_file,
    read_eval_trajectories,
    read_trajectories,
    read_trajectory_file,
)
from groupwise.trajectories.rows import EvalTrajectoryRow, ImageRow, SegmentRow, TrajectoryRow, split_credit
from groupwise.trajectories.writing import FORMAT, eval_to_json, to_json

__all__ = [
    "EVAL_FILE",
    "FOLDER",
    "FORMAT",
    "STEP_FILE",
    "EvalTrajectoryRow",
    "ImageRow",
    "SegmentRow",
    "TrajectoryRow",
    "eval_from_json",
    "eval_to_json",
    "from_json",
    "numbered_files",
    "read_eval_file",
    "read_eval_trajectories",
    "read_trajectories",
    "read_trajectory_file",
    "split_credit",
    "to_json",
]
