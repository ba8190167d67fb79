"""What a run is and what came of it, besides its numbers: settings, versions, findings, warnings, the ledger."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from groupwise.config.keys import describe_keys
from groupwise.config.values import literal
from groupwise.errors import ConfigError
from groupwise.files import json_safe
from groupwise.runs import RunRecord, read_run
from groupwise.runs.reading import json_object, json_rows

_NUMBER = re.compile(r"\.\d+\.")
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


def facts(run: Path, name: str) -> dict[str, Any]:
    """JSON-ready.

    Args:
        name: what the page calls it.
    """
    record = read_run(run)
    summary = json_object(run / "summary.json")
    found = summary.get("findings")
    return json_safe(
        {
            "name": name,
            "path": str(run),
            "state": record.state,
            "problem": record.problem,
            "steps": record.steps,
            "of_steps": record.of_steps,
            "seconds": record.seconds,
            "settings": _settings(record, json_object(run / "origins.json")),
            "command": command(record),
            "versions": json_object(run / "versions.json"),
            "findings": found if isinstance(found, list) else json_rows(run / "findings.jsonl")[0],
            "warnings": list(_warnings(run / "log.txt")),
            "summary": {key: value for key, value in summary.items() if key not in ("findings", "eval")},
            "ledger": _ledger(run / "ledger.jsonl"),
        }
    )


def _settings(record: RunRecord, origins: Mapping[str, Any]) -> list[list[str]]:
    """`[name, value, default, origin]` of each; a list's items have the default of any."""
    defaults = {key.name: key for key in describe_keys()}
    rows: list[list[str]] = []
    for name, value in record.settings.items():
        key = defaults.get(_NUMBER.sub(".N.", name))
        shown = literal(value)
        plain = "" if key is None or key.required else literal(key.default)
        known = {plain} | ({literal(given) for given in key.defaults.values()} if key else set())
        origin = str(origins.get(name) or ("default" if shown in known else "given"))
        rows.append([name, shown, plain, origin])
    return rows


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


def _warnings(log: Path) -> Iterator[str]:
    """Lines of log.txt that warn, the newest of many."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return
    yield from [line for line in lines if re.search(r"\b(WARNING|ERROR|CRITICAL)\b", line)][-_WARNINGS:]


def _ledger(file: Path) -> dict[str, int]:
    """Each prompt that was answered, counted."""
    uids: set[str] = set()
    groups = samples = learned = 0
    for row in json_rows(file)[0]:
        groups += 1
        samples += row["samples"] if isinstance(row.get("samples"), int) else 0
        learned += bool(row.get("learned"))
        uids.add(json.dumps(row.get("uid")))
    return {"groups": groups, "samples": samples, "learned": learned, "prompts": len(uids)}
