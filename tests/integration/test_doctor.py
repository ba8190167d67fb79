"""The doctor in real runs: what it finds, that it ends a run with a checkpoint, and that a resume finds the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from groupwise.cli import main
from groupwise.errors import ConfigError, TrainingError
from groupwise.launch import Given, run_sft, run_training

ReadRows = Callable[[Path], list[dict[str, Any]]]
QUIET = {"doctor": {"ignore": ["throughput_halved"]}}  # which depends on what else the machine does


def same(completions: list[str], **columns: Any) -> list[float]:
    return [1.0] * len(completions)


def by_length(completions: list[str], completion_ids: list[list[int]], **columns: Any) -> list[float]:
    return [-float(len(ids)) for ids in completion_ids]


def rules_of(summary: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {finding["rule"]: finding for finding in summary["findings"]}


@pytest.mark.slow
def test_a_run_that_learns_has_no_findings(task: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = task.config(tmp_path / "run", rollout={"max_completion_tokens": 200}, train={"steps": 25, **QUIET})
    assert run_training(config)["findings"] == []
    assert "warning" not in capsys.readouterr().err


def test_a_constant_reward_is_found_and_said_once(
    task: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    config = task.config(run, reward=[], train={"steps": 14, **QUIET})
    found = rules_of(run_training(config, given=Given(rewards=[same])))
    assert found["reward_constant"]["seen"] == "reward 'same' gave 1 to every sample of the last 10 steps"
    assert (found["reward_constant"]["step"], found["reward_constant"]["count"]) == (10, 5)
    assert (found["groups_equal"]["step"], found["groups_equal"]["count"]) == (5, 10)
    errors = capsys.readouterr().err
    assert errors.count("warning: step 10, reward_constant: reward 'same' gave 1 to every sample") == 1
    assert errors.count("reward_constant") == 1
    assert rules_of(json.loads((run / "summary.json").read_text(encoding="utf-8"))) == found
    assert (run / "log.txt").read_text(encoding="utf-8").count("step 5, groups_equal: in 100% of the groups") == 1


def test_failing_rewards_and_empty_steps_are_found(task: Any, tmp_path: Path) -> None:
    config = task.config(
        tmp_path / "run",
        reward=[{"name": task.reward("raises")}],
        train={"steps": 4, "stop_after_empty_steps": 0, **QUIET},
    )
    found = rules_of(run_training(config))
    assert found["reward_failed"]["seen"] == "reward 'raises' failed on 16 of a step's 16 samples"
    assert found["reward_failed"]["count"] == 4
    assert (found["no_usable_sample"]["step"], found["no_usable_sample"]["count"]) == (1, 4)


def test_answers_that_are_all_cut_and_a_reward_for_length_are_found(task: Any, tmp_path: Path) -> None:
    cut = task.config(tmp_path / "cut", rollout={"max_completion_tokens": 2}, train={"steps": 4, **QUIET})
    assert rules_of(run_training(cut))["answers_cut"]["step"] == 3
    length = task.config(
        tmp_path / "length",
        reward=[],
        rollout={"max_completion_tokens": 200, "group_size": 8},
        train={"steps": 11, **QUIET},
    )
    found = rules_of(run_training(length, given=Given(rewards=[by_length])))
    assert found["reward_is_length"]["seen"].endswith("correlation of reward and length -1.00 over the last 10 steps")


def test_it_ends_the_run_with_a_checkpoint_and_a_resume_goes_on(
    task: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], read_jsonl: ReadRows
) -> None:
    run = tmp_path / "run"
    flags = [*task.flags(run, "--train.steps", "5"), "--rollout.max_completion_tokens", "2"]
    assert main(["train", *flags, "--train.stop_on", "answers_cut"]) == 1
    errors = capsys.readouterr().err
    assert "error: stopped after step 3, as train.stop_on asks: answers_cut: " in errors
    assert f"the model so far is {run}@3" in errors
    assert "Traceback" not in errors
    assert (run / "checkpoints" / "step_000003" / "manifest.json").is_file()
    assert not (run / "final").exists()
    [row] = read_jsonl(run / "findings.jsonl")
    assert (row["step"], row["rule"]) == (3, "answers_cut")
    assert main(["train", "--resume", "--output", str(run), "--train.stop_on", "[]"]) == 0
    found = rules_of(json.loads((run / "summary.json").read_text(encoding="utf-8")))
    assert (found["answers_cut"]["step"], found["answers_cut"]["count"]) == (3, 3)


def test_a_resumed_run_gives_the_findings_of_the_whole_one(task: Any, tmp_path: Path, read_jsonl: ReadRows) -> None:
    def run(folder: str, steps: int, **options: Any) -> list[dict[str, Any]]:
        config = task.config(tmp_path / folder, reward=[], train={"steps": steps, **QUIET})
        found: list[dict[str, Any]] = run_training(config, given=Given(rewards=[same]), **options)["findings"]
        return found

    whole = run("whole", 14)
    assert len(whole) > 1
    run("parts", 7)
    assert run("parts", 14, resume=True) == whole
    rows = [read_jsonl(tmp_path / folder / "findings.jsonl") for folder in ("whole", "parts")]
    assert rows[0] == rows[1] == [{key: finding[key] for key in finding if key != "count"} for finding in whole]


def test_names_are_refused_before_a_model_is_loaded(
    task: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = task.flags(tmp_path / "run")
    assert main(["train", *flags, "--train.stop_on", "reward_flatt", "--dry-run"]) == 2
    assert "did you mean 'reward_flat'?" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_supervised_runs_are_watched_too(task: Any, tmp_path: Path) -> None:
    config = task.config(tmp_path / "run", data={"train": str(task.worked)}, train={"steps": 3})
    assert run_sft(config)["findings"] == []
    wrong = task.config(tmp_path / "two", data={"train": str(task.worked)}, train={"stop_on": ["groups_equal"]})
    with pytest.raises(ConfigError, match=r"train\.stop_on: got 'groups_equal'"):
        run_sft(wrong)


def test_a_stop_at_the_last_step_is_a_stop(task: Any, tmp_path: Path) -> None:
    config = task.config(
        tmp_path / "run", rollout={"max_completion_tokens": 2}, train={"steps": 3, "stop_on": ["answers_cut"]}
    )
    with pytest.raises(TrainingError, match="stopped after step 3"):
        run_training(config)
