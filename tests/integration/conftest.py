"""A tiny model, a task that it can learn in seconds, and runs of it; everything is made here, nothing is downloaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from groupwise.config import Config
from groupwise.quickstart.tiny_model import build_tiny_model

REWARDS = '''
import math, os, time

def low(completion_ids, **columns):
    """The share of tokens in the lower half of the vocabulary: half of them at the start, all of them if learned."""
    return [sum(token < 130 for token in ids) / len(ids) for ids in completion_ids]

def slow(completion_ids, **columns):
    time.sleep(20)
    return [0.0] * len(completion_ids)

def raises(completions, **columns):
    raise RuntimeError("no reward today")

def hangs(completions, **columns):
    time.sleep(1.2)
    return [1.0] * len(completions)

def nan(completions, **columns):
    return [math.nan] * len(completions)

def wrong_length(completions, **columns):
    return [1.0]

def nothing(completions, **columns):
    return [None] * len(completions)

def half(completion_ids, **columns):
    return [float(ids[0]) if i % 2 else math.inf for i, ids in enumerate(completion_ids)]
'''


@dataclass(frozen=True)
class Task:
    """Files of the task.

    Attributes:
        model: a two-layer Qwen3 of width 64 over bytes.
        rows: prompts for GRPO. worked: prompts with completions, for supervised training.
    """

    model: Path
    rows: Path
    worked: Path
    rewards: Path

    def reward(self, name: str) -> str:
        return f"{self.rewards}:{name}"

    def config(self, output: Path, **sections: dict[str, Any] | list[Any]) -> Config:
        """A run of 4 steps; `sections` are laid over it."""
        base: dict[str, Any] = {
            "model": {"path": str(self.model), "dtype": "float32", "device": "cpu"},
            "data": {"train": str(self.rows)},
            "reward": [{"name": self.reward("low")}],
            "rollout": {"group_size": 4, "prompts_per_step": 4, "max_completion_tokens": 8},
            "algorithm": {},
            "optim": {"lr": 0.003},
            "train": {"steps": 4, "output": str(output), "seed": 3, "micro_batch_tokens": 100},
            "tracking": {"backends": ["jsonl"]},
        }
        for name, values in sections.items():
            base[name] = {**base.get(name, {}), **values} if isinstance(values, dict) else values
        return Config.model_validate(base)

    def flags(self, output: Path, *more: str) -> list[str]:
        """The same run as command-line arguments."""
        return [
            *self.supervised_flags(output),
            *("--reward", self.reward("low")),
            *("--rollout.group_size", "4", "--rollout.prompts_per_step", "4", "--rollout.max_completion_tokens", "8"),
            *more,
        ]

    def supervised_flags(self, output: Path) -> list[str]:
        """Those of them that `groupwise sft` takes too."""
        return [
            *("--model", str(self.model), "--data", str(self.rows)),
            *("--output", str(output), "--seed", "3", "--model.dtype", "float32", "--model.device", "cpu"),
            *("--optim.lr", "0.003", "--train.micro_batch_tokens", "100", "--tracking.backends", "jsonl"),
        ]


@pytest.fixture(scope="session")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    folder = tmp_path_factory.mktemp("task")
    words = ["red", "green", "blue", "Käse", "日本", "one", "two", "three", "four", "five"]
    made = Task(folder / "model", folder / "rows.jsonl", folder / "worked.jsonl", folder / "rewards.py")
    made.rows.write_text(lines([{"prompt": f"say {word}:"} for word in words]), encoding="utf-8")
    worked = [{"prompt": f"say {word}:", "completion": f" {word}"} for word in words]
    made.worked.write_text(lines(worked), encoding="utf-8")
    made.rewards.write_text(REWARDS)
    build_tiny_model(made.model, texts=words, size="0.1m", vocab_size=259)
    return made


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


@pytest.fixture
def read_jsonl() -> Callable[[Path], list[dict[str, Any]]]:
    """Rows of a JSON Lines file, strictly: no NaN, no half line."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    def read(path: Path) -> list[dict[str, Any]]:
        text = path.read_text(encoding="utf-8")
        assert text.endswith("\n")
        return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]

    return read


@pytest.fixture
def start_cli() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start `groupwise …` in a process of its own, which is gone when the test is."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "groupwise.cli", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()
