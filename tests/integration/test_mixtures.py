"""Mixtures of experts in whole runs: no mismatch at any step, resumed bit by bit, with the balance loss and without."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoTokenizer,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from groupwise.config import Config
from groupwise.errors import ConfigError
from groupwise.launch import run_sft, run_training
from tests.made_model import SHAPE

ReadRows = Callable[[Path], list[dict[str, Any]]]


def mixture(task: Any, folder: Path, kind: str) -> str:
    """A model folder with the task's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(task.model)
    shape = {
        **SHAPE,
        "vocab_size": 384,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
        "pad_token_id": 0,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: PreTrainedModel = (
            Glm4MoeForCausalLM(Glm4MoeConfig(**shape, n_routed_experts=8, first_k_dense_replace=1))
            if kind == "glm4_moe"
            else Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape, num_experts=8))
        )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("kind", "sections"),
    [
        ("qwen3_moe", {"algorithm": {"router_aux_loss_coef": 0.01, "kl": {"coef": 0.1}}}),
        ("glm4_moe", {"lora": {"rank": 2}, "algorithm": {"kl": {"coef": 0.1}}}),
        ("glm4_moe", {"model": {"dtype": "bfloat16", "gradient_checkpointing": True}}),
    ],
)
def test_a_run_is_exact_and_goes_on_bit_by_bit(
    task: Any, tmp_path: Path, read_jsonl: ReadRows, kind: str, sections: dict[str, Any]
) -> None:
    path = mixture(task, tmp_path / "model", kind)

    def config(name: str, steps: int) -> Config:
        model = {"path": path, "dtype": "float32", **sections.get("model", {})}
        return task.config(tmp_path / name, **{**sections, "model": model}, train={"steps": steps})

    run_training(config("whole", 4))
    run_training(config("parts", 2))
    run_training(config("parts", 4), resume=True)
    (weights,) = (tmp_path / "whole" / "final").glob("*.safetensors")
    assert (tmp_path / "parts" / "final" / weights.name).read_bytes() == weights.read_bytes()
    rows = read_jsonl(tmp_path / "whole" / "metrics.jsonl")
    assert [row["sampling/sampling_logp_difference/max"] for row in rows] == [0.0] * 4
    assert all(row["moe/max_load"] >= 1 and 0 <= row["moe/dead"] < 1 and row["moe/entropy"] > 0 for row in rows)
    assert all(("aux_loss" in row) == ("router_aux_loss_coef" in sections.get("algorithm", {})) for row in rows)
    log = (tmp_path / "whole" / "log.txt").read_text()
    assert "sampler and trainer differ" not in log
    assert ("the experts and their routers have no adapter" in log) == ("lora" in sections)


def test_supervised_training_weighs_the_balance_too(task: Any, tmp_path: Path, read_jsonl: ReadRows) -> None:
    path = mixture(task, tmp_path / "model", "qwen3_moe")
    for coef in (0.0, 0.01):
        run = tmp_path / f"run {coef}"
        given = {"model": {"path": path}, "data": {"train": str(task.worked)}, "train": {"steps": 2}}
        run_sft(task.config(run, **given, algorithm={"router_aux_loss_coef": coef}))
        (first, *_) = read_jsonl(run / "metrics.jsonl")
        assert ("aux_loss" in first) == (coef > 0)
        assert first["moe/max_load"] >= 1


def test_a_balance_loss_that_cannot_act_is_refused_before_there_is_a_run(task: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(ConfigError, match="is no mixture of experts"):
        run_training(task.config(run, algorithm={"router_aux_loss_coef": 0.01}))
    assert not run.exists()
