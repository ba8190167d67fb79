"""Runs that learn nothing do not end as a success, and what goes wrong in a run is seen on its terminal."""

from __future__ import annotations

import asyncio
import json
import math
import os
import signal
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from groupwise.cli import main
from groupwise.data import load_supervised
from groupwise.data.supervised import SupervisedSet
from groupwise.errors import TrainingError
from groupwise.launch import Given, run_sft, run_training
from groupwise.trajectories import read_trajectories

ReadRows = Callable[[Path], list[dict[str, Any]]]
Start = Callable[..., subprocess.Popen[str]]


def failing(completions: list[str], **columns: Any) -> list[float]:
    raise KeyError("answer")


@pytest.mark.parametrize("on_error", ["fail", "zero"])
def test_a_reward_that_always_fails_ends_the_run(
    task: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], read_jsonl: ReadRows, on_error: str
) -> None:
    run = tmp_path / "run"
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f'[[reward]]\nname = {json.dumps(task.reward("raises"))}\non_error = "{on_error}"\n')
    flags = [flag for flag in task.flags(run) if flag not in ("--reward", task.reward("low"))]
    assert main(["train", str(recipe), *flags, "--train.steps", "4"]) == 1
    errors = capsys.readouterr().err
    assert errors.count("error: 3 steps in a row, the last of them step 3, had not one usable sample") == 1
    assert "Most frequent cause: reward 'raises' failed: RuntimeError: no reward today" in errors
    assert "(16 of 16)" in errors
    assert errors.count("warning: reward 'raises' failed on row") == 1
    for step in (1, 2, 3):
        assert errors.count(f"warning: step {step} has not one usable sample") == 1
    assert "Traceback" not in errors
    assert not (run / "final").exists()
    assert not (run / "summary.json").exists()
    rows = read_jsonl(run / "metrics.jsonl")
    assert [row["empty_steps"] for row in rows] == [1, 2, 3]
    assert [row["loss"] for row in rows] == [0, 0, 0]
    assert {row["step"] for row in read_jsonl(run / "ledger.jsonl")} == {1, 2, 3}


def test_a_resumed_run_counts_on(task: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    given = Given(rewards=[failing])
    config = task.config(run, reward=[], train={"steps": 9, "save_every": 1, "stop_after_empty_steps": 2})
    with pytest.raises(TrainingError, match="2 steps in a row, the last of them step 2"):
        run_training(config, given=given)
    more = task.config(run, reward=[], train={"steps": 9, "save_every": 1, "stop_after_empty_steps": 4})
    with pytest.raises(TrainingError, match="4 steps in a row, the last of them step 4"):
        run_training(more, given=given, resume=True)


def test_equal_rewards_are_no_failure(task: Any, tmp_path: Path, read_jsonl: ReadRows) -> None:
    def same(completions: list[str], **columns: Any) -> list[float]:
        return [1.0] * len(completions)

    for name, rollout in (("all", {}), ("dynamic", {"dynamic_sampling_cap": 2})):
        run = tmp_path / name
        config = task.config(run, reward=[], rollout=rollout, train={"steps": 4, "stop_after_empty_steps": 1})
        assert run_training(config, given=Given(rewards=[same]))["steps"] == 4
        assert {row["empty_steps"] for row in read_jsonl(run / "metrics.jsonl")} == {0}


def test_everything_masked_is_empty(task: Any, tmp_path: Path) -> None:
    config = task.config(tmp_path / "run", algorithm={"overlong": "mask"}, rollout={"max_completion_tokens": 1})
    with pytest.raises(TrainingError, match=r"cut off at rollout\.max_completion_tokens"):
        run_training(config)


def test_half_a_surrogate_in_a_reward_s_error_is_no_end(task: Any, tmp_path: Path, read_jsonl: ReadRows) -> None:
    def surrogate(completions: list[str], **columns: Any) -> list[float]:
        raise ValueError("no such file: " + os.fsdecode(b"answer-\xff.txt") + "\x1b[2J\x00")

    run = tmp_path / "run"
    backends = {"backends": ["console", "jsonl", "tensorboard"], "samples_every": 1}
    config = task.config(run, reward=[], tracking=backends, train={"steps": 2, "stop_after_empty_steps": 0})
    assert run_training(config, given=Given(rewards=[surrogate]))["steps"] == 2
    causes = [row.cause for row in read_trajectories(run, steps=[2])]
    assert causes
    assert all(r"no such file: answer-\udcff.txt" in cause for cause in causes)
    log = (run / "log.txt").read_bytes()
    assert rb"answer-\udcff.txt\x1b[2J\x00" in log
    assert b"\x1b" not in log


def test_a_step_without_samples_has_loss_zero_in_trl_s_door(task: Any, tmp_path: Path) -> None:
    from groupwise.compat.trl import GRPOConfig, GRPOTrainer

    seen: list[int] = []

    def reward(completions: list[str], **columns: Any) -> list[float | None]:
        seen.append(0)
        return [None] * len(completions) if len(seen) == 1 else [float(len(c) % 5) for c in completions]

    args = GRPOConfig(
        str(tmp_path / "out"),
        max_steps=3,
        logging_steps=1,
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=8,
        use_cpu=True,
        report_to="none",
    )
    rows = [{"prompt": f"{i} + 1 ="} for i in range(8)]
    trainer = GRPOTrainer(str(task.model), reward, args, train_dataset=rows)
    output = trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == 0.0
    assert len(losses) == 3
    assert output.training_loss == pytest.approx(math.fsum(losses) / 3)
    assert all(math.isfinite(value) for entry in trainer.state.log_history for value in entry.values())


def test_the_first_ctrl_c_is_answered_on_the_terminal(task: Any, tmp_path: Path, start_cli: Start) -> None:
    flags = [*task.flags(tmp_path / "run"), "--tracking.backends", "console", "--train.steps", "100000"]
    process = start_cli("train", *flags)
    assert process.stderr is not None
    seen = ""
    while "step 1/" not in seen:
        line = process.stderr.readline()
        assert line, seen
        seen += line
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.count("warning: stopping after this step, with a checkpoint") == 1
    assert "--resume goes on from there" in errors


def test_the_console_says_which_reward_accuracy_counts(
    task: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rewards = [{"name": task.reward("low"), "weight": 0.1}, {"name": task.reward("nothing"), "weight": 2.0}]
    evaluation = {"data": {"eval": str(task.rows)}, "eval": {"every": 1, "limit": 2}, "train": {"steps": 1}}
    summary = run_training(
        task.config(tmp_path / "run", reward=rewards, tracking={"backends": ["console"]}, **evaluation)
    )
    errors = capsys.readouterr().err
    assert "low accuracy " in errors
    assert "accuracy counts the first reward, 'low' (weight 0.1), and 'nothing' weighs more (2)" in errors
    assert summary["eval"][0]["accuracy_of"] == ["low"]


def test_supervised_steps_without_a_learned_token_end_the_run(
    task: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_jsonl: ReadRows
) -> None:
    def nothing_learned(*arguments: Any, **options: Any) -> SupervisedSet:
        found = load_supervised(*arguments, **options)
        masked = (replace(row, loss_mask=(0,) * len(row.loss_mask)) for row in found.rows)
        return replace(found, rows=tuple(masked))

    monkeypatch.setattr("groupwise.assembly.supervised.load_supervised", nothing_learned)
    run = tmp_path / "run"
    with pytest.raises(TrainingError, match=r"3 steps in a row.*no token to learn \(4 of 4\)\. Raise sft\.max_tokens"):
        run_sft(task.config(run, data={"train": str(task.worked)}, sft={"rows_per_step": 4}, train={"steps": 5}))
    rows = read_jsonl(run / "metrics.jsonl")
    assert [(row["loss"], row["empty_steps"]) for row in rows] == [(0, 1), (0, 2), (0, 3)]
    assert not (run / "final").exists()


def test_rows_that_are_left_out_are_told_of(task: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = {"max_prompt_tokens": 9}
    run_training(task.config(tmp_path / "run", data=data, train={"steps": 1}))
    [told] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: training data")]
    assert told.endswith("of 10 rows: over 9 tokens")


def test_in_a_notebook_s_running_loop_warnings_are_seen_too(
    task: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def cell() -> None:
        run_training(task.config(tmp_path / "run", reward=[]), given=Given(rewards=[failing]))

    with pytest.raises(TrainingError, match="3 steps in a row"):
        asyncio.run(cell())
    assert capsys.readouterr().err.count("warning: step 2 has not one usable sample") == 1
