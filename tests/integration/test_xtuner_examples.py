"""The programs of examples/ that are written with XTuner's names, on a tiny model and the quick start's task."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from groupwise.config import Config
from groupwise.launch import run_sft
from groupwise.quickstart.task import make_task
from groupwise.quickstart.tiny_model import build_tiny_model

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
ReadRows = Callable[[Path], list[dict[str, Any]]]
ANSWERS = ("18", "19", "20", "21")


@dataclass(frozen=True)
class Gsm8k:
    """A stand-in for GSM8K, and a model that guesses: each row's answer is 20, and it says 18 to 21."""

    model: Path
    train: Path
    test: Path


def in_gsm8k_format(file: Path, out: Path, count: int) -> Path:
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    chosen = [row for row in rows if row["reward_model"]["ground_truth"] == "20"][:count]
    assert len(chosen) == count
    out.write_text("".join(json.dumps({**row, "data_source": "openai/gsm8k"}) + "\n" for row in chosen))
    return out


@pytest.fixture(scope="module")
def gsm8k(tmp_path_factory: pytest.TempPathFactory) -> Gsm8k:
    folder = tmp_path_factory.mktemp("gsm8k")
    task = make_task(folder / "task", num_sft=400, num_train=5000, num_eval=1000)
    train = in_gsm8k_format(task.train, folder / "train.jsonl", 64)
    test = in_gsm8k_format(task.test, folder / "test.jsonl", 8)
    draw = random.Random(0)
    asked = [json.loads(line)["prompt"] for line in task.sft.read_text(encoding="utf-8").splitlines()]
    guesses = [{"prompt": prompt, "completion": f"#### {draw.choice(ANSWERS)}"} for prompt in asked]
    (folder / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in guesses))
    texts = [row["prompt"][0]["content"] + row["completion"] for row in guesses]
    build_tiny_model(folder / "fresh", texts=texts, size="0.1m", vocab_size=300)
    warm_up = {
        "model": {"path": str(folder / "fresh"), "device": "cpu", "dtype": "float32"},
        "data": {"train": str(folder / "sft.jsonl")},
        "sft": {"rows_per_step": 16},
        "optim": {"lr": 0.005},
        "train": {"output": str(folder / "warm"), "steps": 40},
        "tracking": {"backends": ["jsonl"]},
    }
    run_sft(Config.model_validate(warm_up))
    return Gsm8k(folder / "warm" / "final", train, test)


def run_program(*command: str, cwd: Path, **variables: str) -> str:
    """Its stderr."""
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("XTUNER")},
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        **variables,
    }
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=110, check=False)
    assert result.returncode == 0, result.stderr
    return result.stderr


def only_run(folder: Path) -> Path:
    (run,) = [path for path in folder.iterdir() if path.is_dir()]
    return run


def rose(rows: list[dict[str, Any]]) -> bool:
    rewards = [row["reward"] for row in rows if row["step"]]
    assert len(rewards) >= 16
    assert sum(rewards[:2]) / 2 < 0.5
    return sum(rewards[-3:]) / 3 > 0.85


def test_the_configuration_file(gsm8k: Gsm8k, tmp_path: Path, read_jsonl: ReadRows) -> None:
    said = run_program(
        *(sys.executable, "-m", "groupwise.cli", "xtuner", str(ROOT / "examples" / "xtuner_config.py"), "lmdeploy"),
        *(str(gsm8k.model), str(gsm8k.train), str(gsm8k.test)),
        cwd=tmp_path,
        TRAIN_STEPS="16",
        TRAIN_BATCH_SIZE="8",
        LEARNING_RATE="3e-3",
        MAX_RESPONSE_LENGTH="16",
    )
    run = only_run(tmp_path / "work_dirs" / f"final_{gsm8k.train.parent.name}_lmdeploy")
    rows = read_jsonl(run / "metrics.jsonl")
    assert rose(rows)
    assert [row["step"] for row in rows if "eval/accuracy" in row] == [16]
    assert rows[-1]["eval/accuracy"] == 1.0
    config = json.loads((run / "config.json").read_text())
    assert config["model"]["dtype"] == "bfloat16"
    assert config["train"] | {"micro_batch_tokens": 32768, "logprob_chunk_tokens": 512, "seed": 123} == config["train"]
    assert "8 x GPU asked for, and torch sees 0 GPU(s)" in said
    assert "XTUNER_USE_LMDEPLOY=1: groupwise's own engine samples" in said
    assert "XTUNER_USE_FA3=1: attention is" in said


def test_the_two_flags(gsm8k: Gsm8k, tmp_path: Path, read_jsonl: ReadRows) -> None:
    (tmp_path / "groupwise").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m groupwise.cli "$@"\n')
    (tmp_path / "groupwise").chmod(0o755)
    command = ["bash", str(ROOT / "examples" / "xtuner_command.sh"), str(gsm8k.model), str(gsm8k.train)]
    run_program(*command, cwd=tmp_path, PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    run = only_run(tmp_path / "runs")
    assert [row["step"] for row in read_jsonl(run / "metrics.jsonl")] == [1, 2]
    (reward,) = json.loads((run / "config.json").read_text())["reward"]
    assert (reward["name"], reward["data_source"]) == ("gsm8k", ["openai/gsm8k"])


def test_the_program(gsm8k: Gsm8k, tmp_path: Path, read_jsonl: ReadRows) -> None:
    said = run_program(
        *(sys.executable, str(ROOT / "examples" / "xtuner_program.py"), "--work-dir", "work"),
        *("--model", str(gsm8k.model), "--train", str(gsm8k.train), "--eval", str(gsm8k.test)),
        *("--global-batch-size", "8", "--total-epochs", "2", "--lr", "3e-3", "--max-response-length", "16"),
        *("--optimizer-steps", "2", "--enable-evaluate"),
        cwd=tmp_path,
    )
    run = only_run(tmp_path / "work")
    rows = read_jsonl(run / "metrics.jsonl")
    assert rose(rows)
    assert [row["step"] for row in rows if "eval/accuracy" in row] == [10, 16]
    assert rows[-1]["kl"] > 0
    for step in (1, 16):
        link = run / f"rollout_idx_{step}_trajectory.jsonl"
        assert read_jsonl(link) == read_jsonl(run / "trajectories" / f"step_{step:06d}.jsonl")
    assert len(read_jsonl(run / "eval_10_trajectory.jsonl")) == 8
    assert "ray.init(num_cpus=128, ignore_reinit_error=True): no cluster is started" in said
    assert "Qwen3Dense8BConfig" in said
    assert "hidden_size = 4096, and the folder has 64" in said
