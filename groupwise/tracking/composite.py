"""All trackers of a run as one. This is the boundary where a tracker's failure ends: the run goes on without it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from groupwise.tracking.base import Tracker

logger = logging.getLogger("groupwise.tracking")


class Trackers:
    """Feeds every tracker; one that raises is warned about once, closed and dropped.

    Example:
        trackers = Trackers({"jsonl": JsonlTracker()})
        trackers.start(config.model_dump(mode="json"), Path("runs/one"))
        trackers.log(1, {"reward": 0.5})
        trackers.close()
    """

    def __init__(self, trackers: Mapping[str, Tracker]) -> None:
        self._trackers = dict(trackers)

    @property
    def names(self) -> tuple[str, ...]:
        """Those that still work."""
        return tuple(self._trackers)

    def start(self, config: Mapping[str, Any], run_dir: Path) -> None:
        self._each(lambda tracker: tracker.start(config, run_dir))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._each(lambda tracker: tracker.log(step, metrics))

    def close(self) -> None:
        self._each(lambda tracker: tracker.close())

    def _each(self, call: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                call(tracker)
            except Exception as error:  # noqa: BLE001 - third-party trackers raise anything
                del self._trackers[name]
                logger.warning(
                    "the %s tracker failed and is off for the rest of this run: %s: %s",
                    name,
                    type(error).__name__,
                    error,
                )
                self._close_quietly(tracker)

    def _close_quietly(self, tracker: Tracker) -> None:
        try:
            tracker.close()
        except Exception as error:  # noqa: BLE001 - it failed already
            logger.debug("closing it failed too: %s", error)
