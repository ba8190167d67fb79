"""A real run feeds its trackers, goes on in the same tracker run, and is exported; the pages' commands work."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from groupwise.cli import main
from groupwise.config.loading import load_config
from groupwise.export.verify import LEAST_AGREEMENT
from groupwise.launch import run_training
from groupwise.tracking.registry import BUILDERS
from groupwise.trajectories import read_trajectories

DOCS = Path(__file__).parents[2] / "docs"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

ReadRows = Callable[[Path], list[dict[str, Any]]]


def blocks(page: str, language: str) -> list[str]:
    text = (DOCS / page).read_text(encoding="utf-8")
    return [body for found, body in FENCE.findall(text) if found == language]


def test_tables_of_samples_are_what_was_trained_on(task: Any, tmp_path: Path, read_jsonl: ReadRows) -> None:
    run = tmp_path / "run"
    tracking = {"backends": ["jsonl"], "samples_every": 2, "samples": 6}
    run_training(task.config(run, train={"save_every": 2}, tracking=tracking))
    found = read_jsonl(run / "samples.jsonl")
    assert [row["step"] for row in found] == [2] * 6 + [4] * 6
    trajectories = list(read_trajectories(run, steps=[4]))[:6]
    assert [row["completion"] for row in found[6:]] == [row.completion for row in trajectories]
    assert [row["reward"] for row in found[6:]] == [row.reward for row in trajectories]
    run_training(task.config(run, train={"steps": 6, "save_every": 2}, tracking=tracking), resume=True)
    assert [row["step"] for row in read_jsonl(run / "samples.jsonl")] == [2] * 6 + [4] * 6 + [6] * 6


@pytest.mark.extras(package="mlflow")
def test_a_run_and_its_continuation_are_one_mlflow_run(task: Any, tmp_path: Path) -> None:
    import mlflow

    run = tmp_path / "run"
    tracking = {"backends": ["jsonl", "mlflow"], "samples_every": 2, "mode": "local", "folder": str(tmp_path / "seen")}
    for steps, resume in ((4, False), (6, True)):
        run_training(task.config(run, train={"steps": steps, "save_every": 2}, tracking=tracking), resume=resume)
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/seen/mlflow/mlflow.db")
    experiment = client.get_experiment_by_name("groupwise")
    [found] = client.search_runs([experiment.experiment_id])
    assert sorted(m.step for m in client.get_metric_history(found.info.run_id, "reward")) == [1, 2, 3, 4, 5, 6]


def test_a_broken_tracker_does_not_stop_a_run(
    task: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, read_jsonl: ReadRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    tracking = {"backends": ["jsonl", "mlflow"], "mode": "online"}
    run_training(task.config(tmp_path / "run", tracking=tracking))
    assert len(read_jsonl(tmp_path / "run" / "metrics.jsonl")) == 4
    assert sum("mlflow tracker failed" in record.getMessage() for record in caplog.records) == 1
    assert "mlflow tracker failed" in (tmp_path / "run" / "log.txt").read_text()


def test_the_export_pages_commands_work(
    task: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run_training(task.config(Path("runs/sums"), model={"path": str(task.model)}))
    commands = [line for block in blocks("export.md", "bash") for line in block.splitlines()]
    assert len(commands) >= 5
    for command in commands:
        assert main(shlex.split(command)[1:]) == 0, f"{command}: {capsys.readouterr().err}"
    assert "20 of 20 greedy answers are the same" in capsys.readouterr().out
    for block in blocks("export.md", "python"):
        exec("".join(f"{line}\n" for line in block.splitlines() if not line.startswith("print(")), {})
    assert Path("out/sums-f16.gguf").is_file()
    assert "reward" in Path("out/sums/README.md").read_text()


def test_the_export_page_states_the_measure() -> None:
    text = (DOCS / "export.md").read_text(encoding="utf-8")
    stated = {
        name.strip(): float(share) / 100
        for names, share in re.findall(r"^\| ([\w, ]+?) \| (\d+) % \|$", text, re.MULTILINE)
        for name in names.split(",")
    }
    assert stated == LEAST_AGREEMENT


def test_the_tracker_page_names_every_tracker_and_its_commands_parse(
    task: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (DOCS / "trackers.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)) == set(BUILDERS)
    monkeypatch.chdir(tmp_path)
    recipe = {"model.path": str(task.model), "data.train": str(task.rows), "train.steps": 1}
    lines = [f"{name} = {json.dumps(value)}" for name, value in recipe.items()]
    reward = f"[[reward]]\nname = {json.dumps(task.reward('low'))}\n"
    Path("run.toml").write_text("\n".join(lines) + "\n" + reward)
    for number, block in enumerate(blocks("trackers.md", "toml")):
        Path(f"{number}.toml").write_text(block)
        load_config(f"{number}.toml")
    for command in [line for block in blocks("trackers.md", "bash") for line in block.splitlines()]:
        assert main([*shlex.split(command)[1:], "--dry-run"]) == 0
