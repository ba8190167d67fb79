"""What rewards and callbacks do to their data and to the process changes nothing of the run."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from groupwise.compat.trl import GRPOConfig, GRPOTrainer
from groupwise.launch import Given, run_training
from groupwise.trajectories import read_trajectories

ReadRows = Callable[[Path], list[dict[str, Any]]]

REWARDS = """
import logging, os, sys, warnings

def uses_up(completions, allowed):
    out = []
    for text, words in zip(completions, allowed, strict=True):
        n = 0
        for c in text:
            if c in words:
                words.remove(c)
                n += 1
        out.append(n / 10)
    return out

def surrogate(completions):
    raise ValueError("no such file: " + os.fsdecode(b"answer-\\xff.txt"))

def short(completion_ids, **columns):
    return [sum(token < 130 for token in ids) / len(ids) for ids in completion_ids]

def untidy(completion_ids, **columns):
    import locale, torch
    os.chdir("/")
    os.environ.clear()
    os.umask(0o777)
    torch.set_default_dtype(torch.float64)
    locale.setlocale(locale.LC_ALL, "C")
    logging.disable(logging.CRITICAL)
    logging.getLogger("groupwise").handlers.clear()
    warnings.simplefilter("error")
    sys.stdout = sys.stderr = None
    return short(completion_ids)
"""


@pytest.fixture
def rewards(tmp_path: Path) -> str:
    path = tmp_path / "user_code_rewards.py"
    path.write_text(REWARDS)
    return str(path)


def small(output: Path, **arguments: Any) -> GRPOConfig:
    shape = {"per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 6, "logging_steps": 1}
    return GRPOConfig(str(output), **{**shape, "max_steps": 2, "use_cpu": True, "disable_tqdm": True, **arguments})


def test_a_reward_that_uses_its_column_up_scores_equal_answers_equally_and_a_resumed_run_is_the_same(
    task: Any, tmp_path: Path, rewards: str, read_jsonl: ReadRows
) -> None:
    rows = tmp_path / "rows.jsonl"
    letters = [chr(code) for code in range(32, 127)]
    rows.write_text("".join(json.dumps({"prompt": f"say {i}:", "allowed": letters}) + "\n" for i in range(4)))
    named = {"data": {"train": str(rows)}, "reward": [{"name": f"{rewards}:uses_up"}]}
    whole, cut = (tmp_path / name for name in ("whole", "cut"))
    run_training(task.config(whole, **named, train={"steps": 4, "save_every": 1}))
    run_training(task.config(cut, **named, train={"steps": 2, "save_every": 1}))
    run_training(task.config(cut, **named, train={"steps": 4, "save_every": 1}), resume=True)
    for file in ("ledger.jsonl", "final/model.safetensors", "trajectories/step_000004.jsonl"):
        assert (whole / file).read_bytes() == (cut / file).read_bytes(), file
    samples = list(read_trajectories(whole))
    scores: dict[str, set[float | None]] = {}
    for row in samples:
        scores.setdefault(row.completion, set()).add(row.reward)
    assert all(len(found) == 1 for found in scores.values())
    assert max(row.reward or 0.0 for row in samples if row.step == 4) > 0.1


def test_an_error_with_half_a_surrogate_is_a_failed_sample(
    task: Any, tmp_path: Path, rewards: str, read_jsonl: ReadRows
) -> None:
    named = [{"name": f"{rewards}:short"}, {"name": f"{rewards}:surrogate", "on_error": "zero"}]
    run_training(task.config(tmp_path / "run", reward=named, train={"steps": 2}))
    numbers = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert [row["rewards/surrogate/errors"] for row in numbers if row["step"]] == [16.0, 16.0]


def test_trl_a_reward_that_pops_from_a_nested_column_fails_for_no_sample(task: Any, tmp_path: Path) -> None:
    def graded(completions: Any, spec: Any, **columns: Any) -> list[float]:
        return [float(len(c) % s.pop("modulus")) for c, s in zip(completions, spec, strict=True)]

    rows = Dataset.from_list([{"prompt": "Hi", "spec": {"modulus": 3}}] * 4)
    trainer = GRPOTrainer(str(task.model), graded, small(tmp_path / "out"), train_dataset=rows)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["rewards/graded/errors"] for entry in logs] == [0.0, 0.0]
    assert rows[0]["spec"] == {"modulus": 3}


def test_trl_rewards_that_need_the_main_thread_score_every_sample(task: Any, tmp_path: Path) -> None:
    database = sqlite3.connect(":memory:")

    def timed(completion_ids: Any, answer: Any, log_metric: Any, trainer_state: Any) -> list[float]:
        old = signal.signal(signal.SIGALRM, signal.SIG_DFL)
        try:
            signal.alarm(5)
            log_metric("seen_at", float(trainer_state.global_step))
            return [sum(token < 130 for token in ids) / len(ids) for ids in completion_ids]
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, old)

    def looked_up(completions: Any, answer: Any, **columns: Any) -> list[float]:
        return [float(database.execute("select length(?)", (a,)).fetchone()[0]) for a in answer]

    rows = [{"prompt": f"{i} + 1 =", "answer": str(i + 1)} for i in range(8)]
    trainer = GRPOTrainer(str(task.model), [timed, looked_up], small(tmp_path / "out", max_steps=3), train_dataset=rows)
    before = trainer.model.get_input_embeddings().weight.clone()
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 3
    for step, entry in enumerate(logs):
        assert (entry["rewards/timed/errors"], entry["rewards/looked_up/errors"]) == (0.0, 0.0)
        assert 0 < entry["rewards/timed/mean"] < 1
        assert entry["rewards/looked_up/mean"] == 1.0
        assert entry["seen_at"] == step
    assert not before.equal(trainer.model.get_input_embeddings().weight)
    assert (tmp_path / "out" / "run" / "log.txt").read_text().count("needs a main thread") == 2


def test_a_reward_that_changes_the_process_moves_no_output_and_changes_no_bit(
    task: Any, tmp_path: Path, rewards: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("short", "untidy"):
        run_training(task.config(Path(name), reward=[{"name": f"{rewards}:{name}"}], train={"save_every": 2}))
    files = ("ledger.jsonl", "final/model.safetensors", "summary.json", "checkpoints/step_000004/manifest.json")
    assert all((tmp_path / name / file).is_file() for name in ("short", "untidy") for file in files)
    assert (tmp_path / "untidy" / files[0]).read_bytes() == (tmp_path / "short" / files[0]).read_bytes()
    assert (tmp_path / "untidy" / files[1]).read_bytes() == (tmp_path / "short" / files[1]).read_bytes()
    log = (tmp_path / "untidy" / "log.txt").read_text()
    assert log.count("changed what the whole process shares") >= 1
    assert "working directory" in log
    assert torch.get_default_dtype() == torch.float32


class Untidy(TrainerCallback):
    """Changes what it can reach, at the end of each step."""

    def __init__(self) -> None:
        self.steps = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        self.steps += 1
        os.chdir("/")
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")
        torch.set_grad_enabled(False)
        warnings.simplefilter("error")
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **objects: Any) -> None:
        logs.clear()


def test_trl_a_callback_that_changes_the_process_changes_nothing_of_the_run(
    task: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def low(completion_ids: Any, **columns: Any) -> list[float]:
        return [sum(token < 130 for token in ids) / len(ids) for ids in completion_ids]

    rows = [{"prompt": f"{i} + 1 ="} for i in range(8)]
    weights, callback = [], Untidy()
    for name, callbacks in (("tidy", []), ("untidy", [callback])):
        trainer = GRPOTrainer(str(task.model), low, small(Path(name)), train_dataset=rows, callbacks=callbacks)
        output = trainer.train()
        assert "train_loss" in output.metrics
        assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [1, 2]
        weights.append((tmp_path / name / "run" / "final" / "model.safetensors").read_bytes())
    assert callback.steps == 2
    assert weights[0] == weights[1]
    assert Path.cwd() == tmp_path
    assert signal.getsignal(signal.SIGINT) is not signal.SIG_IGN


def test_a_template_that_opens_thoughts_lets_think_format_be_earned(
    task: Any, tmp_path: Path, read_jsonl: ReadRows
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": [{"role": "user", "content": "2 + 2?"}]}) + "\n")
    seen: list[list[str]] = []

    def watches(rendered_prompts: Any, completions: Any) -> list[float]:
        seen.append(rendered_prompts)
        return [0.0] * len(completions)

    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<think>\n{% endif %}"
    config = task.config(
        tmp_path / "run",
        model={"chat_template": template},
        data={"train": str(rows)},
        reward=[{"name": "think_format"}],
        train={"steps": 1},
    )
    run_training(config, given=Given(rewards=[watches]))
    assert seen[0] == ["2 + 2?<think>\n"] * 4
