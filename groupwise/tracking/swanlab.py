"""SwanLab. Its online default fails without a login, so the mode is chosen here."""

from __future__ import annotations

import importlib.util
import logging
import shlex
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from groupwise.tracking.base import Sample, SampleTable
from groupwise.tracking.facts import RunFacts, keep_id, new_id

logger = logging.getLogger("groupwise.tracking")

NAME = "swanlab"
VIEWER = "swanboard"  # SwanLab's viewer; without it local mode writes what nothing can show


class SwanLabTracker:
    """One SwanLab experiment; a resumed run goes on in it when it is online, and beside it on this machine."""

    def __init__(self, facts: RunFacts) -> None:
        self._facts = facts
        self._run: Any = None

    def start(self, config: Mapping[str, Any], run_dir: Path) -> None:
        swanlab = import_module("swanlab")

        run_id = self._facts.earlier_id(run_dir, NAME) or new_id()
        folder = self._facts.local_folder(run_dir, NAME)
        self._run = swanlab.init(
            project=self._facts.project,
            name=self._facts.name,
            id=run_id,
            resume="allow",
            log_dir=str(folder),
            config=dict(config),
            mode=self._mode(swanlab, folder),
            # Training's own output is in log.txt; catching it would slow the progress bar.
            settings=swanlab.Settings(terminal={"proxy_type": "none"}),
        )
        keep_id(run_dir, NAME, run_id)

    def _mode(self, swanlab: Any, folder: Path) -> Literal["online", "local", "offline"] | None:
        """None leaves it to swanlab, and so to SWANLAB_MODE."""
        if self._facts.mode == "online":
            return "online"
        local: Literal["local", "offline"] = "local" if importlib.util.find_spec(VIEWER) else "offline"
        if self._facts.mode == "local":
            return local
        settings = swanlab.Settings()
        if settings.mode != "online" or settings.api_key is not None:
            return None
        place = shlex.quote(str(folder))
        look = f"`swanlab watch {place}` shows it" if local == "local" else f"`swanlab sync {place}/run-*` sends it"
        logger.warning(
            "swanlab: no login found, so this run stays on this machine (%s); `swanlab login` puts the next online",
            look,
        )
        return local

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        swanlab = import_module("swanlab")

        found = SampleTable.of(step, samples)
        table = swanlab.echarts.Table()
        table.add(list(found.columns), [list(row) for row in found.rows])
        self._run.log({"samples": table}, step=step)

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()
            self._run = None
