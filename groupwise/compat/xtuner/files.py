"""Trajectories under XTuner's file names."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from groupwise.trajectories import EVAL_FILE, FOLDER, STEP_FILE
from groupwise.watching import Unwatched, Wish

logger = logging.getLogger(__name__)

NAMES = {STEP_FILE: "rollout_idx_{}_trajectory.jsonl", EVAL_FILE: "eval_{}_trajectory.jsonl"}
"""Names in `trajectories/` -> XTuner's, in the run directory itself; both with the step."""


class TrajectoryLinks(Unwatched):
    """A run's watcher that links each step's files as soon as the step is done."""

    def __init__(self, run: Path) -> None:
        self._run = run
        self._possible = True

    def logged(self, step: int, metrics: Mapping[str, float]) -> Wish:
        for own, theirs in NAMES.items():
            file = Path(FOLDER, own.format(step))
            if self._possible and (self._run / file).is_file():
                self._link(self._run / theirs.format(step), file)
        return Wish()

    def _link(self, link: Path, file: Path) -> None:
        if link.is_symlink():  # a step that is done again after a resume
            return
        try:
            link.symlink_to(file)
        except OSError as error:
            self._possible = False
            logger.warning("no links with XTuner's names (%s); the same files are in %s", error, file.parent)
