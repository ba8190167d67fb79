"""What a tracker is. A new one is one file and one line in `registry`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol


class Tracker(Protocol):
    """Receives a run's numbers. Whatever it raises drops it from the run and nothing else, see `Trackers`.

    Example:
        class PrintTracker:
            def start(self, config, run_dir): print("start", run_dir)
            def log(self, step, metrics): print(step, metrics["reward"])
            def close(self): pass
    """

    def start(self, config: Mapping[str, Any], run_dir: Path) -> None:
        """Called once before the first `log`; `config` is the resolved config as plain values."""
        ...

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One step's numbers, in a fixed order; steps rise from call to call, and a value may be NaN."""
        ...

    def close(self) -> None:
        """Called once at the end, also after an error."""
        ...
