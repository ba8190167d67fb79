"""Weights & Biases; without a login its files stay on this machine."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from groupwise.tracking.base import Sample, SampleTable
from groupwise.tracking.facts import RunFacts, keep_id, new_id

logger = logging.getLogger("groupwise.tracking")

NAME = "wandb"
START_SECONDS, FINISH_SECONDS = 30.0, 10.0


class WandbTracker:
    """One W&B run; a resumed run goes on in it. The step is the metric `step`, so that repeated steps are kept."""

    def __init__(self, facts: RunFacts) -> None:
        self._facts = facts
        self._run: Any = None

    def start(self, config: Mapping[str, Any], run_dir: Path) -> None:
        wandb = import_module("wandb")

        run_id = self._facts.earlier_id(run_dir, NAME) or new_id()
        folder = self._facts.local_folder(run_dir, NAME)
        self._run = wandb.init(
            project=self._facts.project,
            name=self._facts.name,
            id=run_id,
            resume="allow",
            dir=folder,
            config=dict(config),
            mode=self._mode(wandb, folder),
            # Training's own output is in log.txt; catching it would slow the progress bar.
            # wandb waits for its server when the process ends, for as long as these say.
            settings=wandb.Settings(console="off", init_timeout=START_SECONDS, finish_timeout=FINISH_SECONDS),
        )
        keep_id(run_dir, NAME, run_id)
        # W&B's own step may only rise; a run that goes on from a checkpoint repeats some.
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def _mode(self, wandb: Any, folder: Path) -> Literal["online", "offline"] | None:
        """None leaves it to wandb, and so to WANDB_MODE."""
        if self._facts.mode != "auto":
            return "online" if self._facts.mode == "online" else "offline"
        if wandb.setup().settings.mode != "online" or wandb.login(prompt=False, verify=False):
            return None
        logger.warning(
            "wandb: no login found, so this run stays in %s; `wandb login` puts the next one online, and "
            "`wandb sync %s/wandb/offline-run-*` this one",
            folder,
            shlex.quote(str(folder)),
        )
        return "offline"

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log({"step": step, **metrics})

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        wandb = import_module("wandb")

        table = SampleTable.of(step, samples)
        rows = [list(row) for row in table.rows]
        self._run.log({"step": step, "samples": wandb.Table(columns=list(table.columns), data=rows)})

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()
            self._run = None
