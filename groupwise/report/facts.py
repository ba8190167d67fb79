"""What a run is and what came of it, besides its numbers: settings, versions, findings, warnings, the ledger."""

from __future__ import annotations

import json
import re
import shlex
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from groupwise.config.keys import describe_keys
from groupwise.config.values import literal
from groupwise.errors import ConfigError
from groupwise.files import json_safe
from groupwise.runs import RunRecord, read_run
from groupwise.runs.reading import json_object, json_rows, whole_lines

_NUMBER = re.compile(r"\.\d+\.")
_WARNING = re.compile(rb"\b(WARNING|ERROR|CRITICAL)\b")
_WARNINGS = 200


def check_run(run: Path) -> None:
    """Refuse what is no run's directory.

    Raises:
        ConfigError: no folder, or none with a run's files.
    """
    if not run.is_dir():
        raise ConfigError(f"{run} is no folder; expected a run directory, as `groupwise runs` lists them")
    if not any((run / name).is_file() for name in ("config.json", "metrics.jsonl", "versions.json")):
        raise ConfigError(f"{run} holds neither config.json nor metrics.jsonl; expected a run directory")


@dataclass(slots=True)
class _Ledger:
    """`ledger.jsonl` added up, read on; it begins anew where it has become shorter."""

    file: Path
    uids: set[str] = field(default_factory=set[str])
    groups: int = 0
    samples: int = 0
    learned: int = 0
    read: int = 0

    def refresh(self) -> None:
        if _size(self.file) < self.read:
            self.uids, self.groups, self.samples, self.learned, self.read = set(), 0, 0, 0, 0
        rows, self.read = json_rows(self.file, self.read)
        self.groups += len(rows)
        self.samples += sum(row["samples"] for row in rows if isinstance(row.get("samples"), int))
        self.learned += sum(bool(row.get("learned")) for row in rows)
        self.uids.update(json.dumps(row.get("uid")) for row in rows)

    def record(self) -> dict[str, int]:
        return {
            "groups": self.groups,
            "samples": self.samples,
            "learned": self.learned,
            "prompts": len(self.uids),
        }


@dataclass(slots=True)
class _Warnings:
    """Lines of log.txt that warn, the newest of many, read on."""

    file: Path
    lines: deque[str] = field(default_factory=lambda: deque[str](maxlen=_WARNINGS))
    read: int = 0

    def refresh(self) -> None:
        if _size(self.file) < self.read:
            self.lines.clear()
            self.read = 0
        found, self.read = whole_lines(self.file, self.read)
        self.lines.extend(line.decode("utf-8", "replace").rstrip() for line in found if _WARNING.search(line))


class RunFacts:
    """What is known of one run so far.

    Args:
        name: what the page calls it.
    """

    def __init__(self, run: Path, name: str) -> None:
        self._run, self._name = run, name
        self._ledger = _Ledger(run / "ledger.jsonl")
        self._warnings = _Warnings(run / "log.txt")

    def refresh(self) -> None:
        """Read what was written since."""
        self._ledger.refresh()
        self._warnings.refresh()

    def record(self, metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """JSON-ready.

        Args:
            metrics: rows of metrics.jsonl.
        """
        record = read_run(self._run, metrics)
        summary = json_object(self._run / "summary.json")
        found = summary.get("findings")
        return json_safe(
            {
                "name": self._name,
                "path": str(self._run),
                "state": record.state,
                "problem": record.problem,
                "steps": record.steps,
                "of_steps": record.of_steps,
                "seconds": record.seconds,
                "settings": list(_settings(record, json_object(self._run / "origins.json"))),
                "command": command(record),
                "versions": json_object(self._run / "versions.json"),
                "findings": found if isinstance(found, list) else json_rows(self._run / "findings.jsonl")[0],
                "warnings": list(self._warnings.lines),
                "summary": {key: value for key, value in summary.items() if key not in ("findings", "eval")},
                "ledger": self._ledger.record(),
            }
        )


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return 0


def _settings(record: RunRecord, origins: Mapping[str, Any]) -> Iterator[list[str]]:
    """`[name, value, default, origin]` of each; a list's items have the default of any."""
    defaults = {key.name: key for key in describe_keys()}
    for name, value in record.settings.items():
        key = defaults.get(_NUMBER.sub(".N.", name))
        shown = literal(value)
        plain = "" if key is None or key.required else literal(key.default)
        known = {plain} | ({literal(given) for given in key.defaults.values()} if key else set())
        yield [name, shown, plain, str(origins.get(name) or ("default" if shown in known else "given"))]


def command(record: RunRecord) -> str:
    """What would make the run again, elsewhere: its settings, apart from those at their defaults."""
    if not record.settings:
        return ""
    given: list[str] = []
    for name, shown, _, origin in _settings(record, {}):
        value = record.settings[name]
        text = value if isinstance(value, str) else shown
        if origin != "default":
            given += [f"--{name}={text}"] if text.startswith("--") else [f"--{name}", text]
    kind = "train" if any(name.startswith("reward.") for name in record.settings) else "sft"
    return shlex.join(["groupwise", kind, *given])
