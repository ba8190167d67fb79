"""All trackers of a run as one. This is the boundary where a tracker's failure ends: the run goes on without it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from groupwise.batches import TrainingBatch, mean_credit
from groupwise.errors import FileError
from groupwise.files import json_safe
from groupwise.texts import one_line
from groupwise.tracking.background import Background
from groupwise.tracking.base import Sample, Tracker

logger = logging.getLogger("groupwise.tracking")


class Trackers:
    """Feeds every tracker with copies of its own; one that raises is warned about once, closed and dropped.

    The run's own files are none that it could go on without: where they cannot be written, their `FileError` ends it.

    Args:
        samples_every: steps between tables of sampled completions; 0 makes none.
        samples: completions in one table.

    Example:
        trackers = Trackers({"jsonl": JsonlTracker()})
        trackers.start(config.model_dump(mode="json"), Path("runs/one"))
        trackers.log(1, {"reward": 0.5})
        trackers.close()
    """

    def __init__(self, trackers: Mapping[str, Tracker], *, samples_every: int = 0, samples: int = 8) -> None:
        self._trackers = dict(trackers)
        self._samples_every = samples_every
        self._samples = samples

    @property
    def names(self) -> tuple[str, ...]:
        """Those that still work."""
        return tuple(self._trackers)

    def start(self, config: Mapping[str, Any], run_dir: Path) -> None:
        clean = json_safe(config)  # third-party trackers and their servers take no lone surrogates
        self._each(lambda tracker: tracker.start(deepcopy(clean), run_dir))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        clean = {one_line(name): value for name, value in metrics.items()}  # user code names rewards
        self._each(lambda tracker: tracker.log(step, dict(clean)))

    def samples(self, step: int, batch: TrainingBatch) -> None:
        """Show some of the batch's completions, if a table is due."""
        if self._samples_every and step % self._samples_every == 0:
            chosen = choose_samples(batch, self._samples)
            self._each(lambda tracker: tracker.samples(step, list(chosen)))

    def close(self) -> None:
        for tracker in self._trackers.values():
            if isinstance(tracker, Background):  # the slow ones end side by side
                tracker.stop()
        self._each(lambda tracker: tracker.close())

    def _each(self, call: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                call(tracker)
            except FileError as error:
                if not isinstance(tracker, Background):  # the run's own numbers: without them it does not go on
                    raise
                self._drop(name, tracker, error)
            except Exception as error:  # noqa: BLE001 - third-party trackers raise anything
                self._drop(name, tracker, error)

    def _drop(self, name: str, tracker: Tracker, error: Exception) -> None:
        del self._trackers[name]
        logger.warning(
            "the %s tracker failed and is off for the rest of this run: %s: %s%s",
            name,
            type(error).__name__,
            error,
            _hint(error),
        )
        self._close_quietly(tracker)

    def _close_quietly(self, tracker: Tracker) -> None:
        try:
            tracker.close()
        except Exception as error:  # noqa: BLE001 - it failed already
            logger.debug("closing it failed too: %s", error)


def choose_samples(batch: TrainingBatch, count: int) -> list[Sample]:
    """The first `count` completions of the batch, prompt by prompt, so that those of one prompt can be compared."""
    chosen: list[Sample] = []
    for group, credit in zip(batch.groups, batch.credit, strict=True):
        for rollout, given in zip(group.rollouts, credit, strict=True):
            if len(chosen) == count:
                return chosen
            rewards, advantage = dict(rollout.rewards), mean_credit(given)
            chosen.append(Sample(group.prompt.text, rollout.text, rollout.reward, rewards, advantage))
    return chosen


def _hint(error: Exception) -> str:
    return "; install it with: pip install 'groupwise[trackers]'" if isinstance(error, ModuleNotFoundError) else ""
