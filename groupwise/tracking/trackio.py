"""trackio: a database in the user's cache (`TRACKIO_DIR` moves it), or a Space or server named by its variables."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from groupwise.errors import ConfigError
from groupwise.tracking.base import Sample, SampleTable
from groupwise.tracking.facts import RunFacts, keep_id

NAME = "trackio"
REMOTES = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")


class TrackioTracker:
    """One trackio run; a resumed run goes on in it. `trackio show --project NAME` shows it."""

    def __init__(self, facts: RunFacts) -> None:
        self._facts = facts
        self._run: Any = None

    def start(self, config: Mapping[str, Any], run_dir: Path) -> None:
        self._check_mode()
        trackio = import_module("trackio")

        earlier = self._facts.earlier_id(run_dir, NAME)
        run = trackio.init(
            project=self._facts.project,
            name=self._facts.name,
            config=dict(config),
            resume="never" if earlier is None else "must",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        self._run = run
        if earlier is not None and run.id != earlier:
            # trackio finds runs by name alone, and takes the newest.
            raise ConfigError(
                f"trackio has a newer run called {self._facts.name!r} in {self._facts.project!r}, and this one would "
                "go on in it; give that one another name"
            )
        keep_id(run_dir, NAME, str(run.id))

    def _check_mode(self) -> None:
        """The mode that was asked for must be the one that trackio will take from its variables."""
        named = [name for name in REMOTES if os.environ.get(name)]
        if self._facts.mode == "online" and not named:
            raise ConfigError(f'tracking.mode = "online" needs {" or ".join(REMOTES)} for trackio; neither is set')
        if self._facts.mode == "local" and named:
            raise ConfigError(f'tracking.mode = "local", but {named[0]} is set; unset it')

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        trackio = import_module("trackio")

        table = SampleTable.of(step, samples)
        rows = [list(row) for row in table.rows]
        self._run.log({"samples": trackio.Table(columns=list(table.columns), data=rows)}, step=step)

    def close(self) -> None:
        if self._run is not None:
            run, self._run = self._run, None
            run.finish()
