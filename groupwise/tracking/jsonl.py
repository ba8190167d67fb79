"""`metrics.jsonl`: one JSON object per step, durable after each; NaN is null."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from groupwise.files import append_rows, truncate_rows

METRICS_FILE = "metrics.jsonl"


class JsonlTracker:
    """Writes `run_dir/metrics.jsonl`, each row `{"step": 3, "reward": 0.5, …}`.

    Args:
        resumed_step: last step of the checkpoint that the run continues from; rows after it are cut off at the start,
            for the run writes them again. None in a new run.
    """

    def __init__(self, *, resumed_step: int | None = None) -> None:
        self._resumed_step = resumed_step
        self._path: Path | None = None

    def start(self, config: Mapping[str, Any], run_dir: Path) -> None:
        self._path = run_dir / METRICS_FILE
        if self._resumed_step is not None:
            truncate_rows(self._path, self._resumed_step)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        assert self._path is not None, "start() comes before log()"
        append_rows(self._path, [{"step": step, **metrics}])

    def close(self) -> None:
        self._path = None
