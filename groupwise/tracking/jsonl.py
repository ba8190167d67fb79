"""`metrics.jsonl`: one JSON object per step, durable after each; NaN is null. `samples.jsonl`: one per sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from groupwise.files import append_rows, truncate_rows
from groupwise.tracking.base import Sample

METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.jsonl"


class JsonlTracker:
    """Writes `run_dir/metrics.jsonl`, each row `{"step": 3, "reward": 0.5, …}`.

    Args:
        resumed_step: last step of the checkpoint that the run continues from; rows after it are cut off at the start,
            for the run writes them again. None in a new run.
    """

    def __init__(self, *, resumed_step: int | None = None) -> None:
        self._resumed_step = resumed_step
        self._folder: Path | None = None

    def start(self, config: Mapping[str, Any], run_dir: Path) -> None:
        self._folder = run_dir
        if self._resumed_step is not None:
            truncate_rows(run_dir / METRICS_FILE, self._resumed_step)
            truncate_rows(run_dir / SAMPLES_FILE, self._resumed_step)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        assert self._folder is not None, "start() comes before log()"
        append_rows(self._folder / METRICS_FILE, [{"step": step, **metrics}])

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        assert self._folder is not None, "start() comes before samples()"
        append_rows(self._folder / SAMPLES_FILE, ({"step": step, **asdict(sample)} for sample in samples))

    def close(self) -> None:
        self._folder = None
