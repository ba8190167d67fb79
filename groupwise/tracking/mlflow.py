"""MLflow: a SQLite file on this machine, or the server that `MLFLOW_TRACKING_URI` names."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from groupwise.errors import ConfigError
from groupwise.files import json_safe
from groupwise.tracking.base import Sample, SampleTable
from groupwise.tracking.facts import RunFacts, keep_id

logger = logging.getLogger("groupwise.tracking")

NAME = "mlflow"
MOST_PARAMS = 100  # of one request
LONGEST_PARAM = 6000  # characters
_NOT_IN_NAMES = re.compile(r"[^\w\-. :/]", re.ASCII)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where runs and their files go.

    Attributes:
        files: for an experiment made here; None leaves it to the server.
    """

    uri: str
    files: str | None


class MlflowTracker:
    """One MLflow run, through a client of its own: the program's active run and its settings are left alone."""

    def __init__(self, facts: RunFacts) -> None:
        self._facts = facts
        self._client: Any = None
        self._run_id = ""

    def start(self, config: Mapping[str, Any], run_dir: Path) -> None:
        mlflow = import_module("mlflow")

        place = self._place(mlflow, run_dir)
        client = mlflow.MlflowClient(tracking_uri=place.uri)
        earlier = self._facts.earlier_id(run_dir, NAME)
        if earlier is not None:
            self._run_id = earlier
            client.update_run(earlier, status="RUNNING")
        else:
            found = client.get_experiment_by_name(self._facts.project)
            experiment = (
                client.create_experiment(self._facts.project, artifact_location=place.files)
                if found is None
                else found.experiment_id
            )
            self._run_id = client.create_run(experiment, run_name=self._facts.name).info.run_id
            self._log_config(client, config)
            keep_id(run_dir, NAME, self._run_id)
        self._client = client

    def _place(self, mlflow: Any, run_dir: Path) -> _Place:
        if self._facts.mode != "local" and mlflow.is_tracking_uri_set():
            return _Place(mlflow.get_tracking_uri(), None)
        if self._facts.mode == "online":
            raise ConfigError('tracking.mode = "online" needs MLFLOW_TRACKING_URI for mlflow; it is not set')
        folder = self._facts.local_folder(run_dir, NAME)
        uri = f"sqlite:///{folder}/mlflow.db"
        logger.info("mlflow: `mlflow ui --backend-store-uri %s` shows this run", uri)
        return _Place(uri, (folder / "files").as_uri())

    def _log_config(self, client: Any, config: Mapping[str, Any]) -> None:
        entities = import_module("mlflow.entities")

        params = [entities.Param(_valid_name(name), text[:LONGEST_PARAM]) for name, text in _flat(config)]
        for first in range(0, len(params), MOST_PARAMS):
            client.log_batch(self._run_id, params=params[first : first + MOST_PARAMS])
        client.log_dict(self._run_id, json_safe(config), "config.json")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        entities = import_module("mlflow.entities")

        now = int(time.time() * 1000)
        values = [entities.Metric(_valid_name(name), float(value), now, step) for name, value in metrics.items()]
        self._client.log_batch(self._run_id, metrics=values)

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        table = SampleTable.of(step, samples)
        data = {name: [row[place] for row in table.rows] for place, name in enumerate(table.columns)}
        self._client.log_table(self._run_id, data=data, artifact_file=f"samples/step_{step:06d}.json")

    def close(self) -> None:
        if self._client is not None:
            self._client.set_terminated(self._run_id)
            self._client = None


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", str(value)


def _valid_name(name: str) -> str:
    """MLflow refuses a whole step for one sign that it does not like in a name."""
    return _NOT_IN_NAMES.sub("_", name)
