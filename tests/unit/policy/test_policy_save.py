"""Writing the model: whole or not at all, and as transformers knows it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from groupwise.algorithms import build_algorithm
from groupwise.config import AlgorithmConfig, OptimConfig, TrainConfig
from groupwise.policy import Learner
from groupwise.policy.saving import write_model


def test_a_model_folder_is_replaced_whole(make_model: Any, tmp_path: Path) -> None:
    policy = Learner(
        make_model(),
        build_algorithm(AlgorithmConfig.model_validate({})),
        optim=OptimConfig.model_validate({}),
        train=TrainConfig.model_validate({}),
        total_updates=1,
    )
    target = tmp_path / "final"
    target.mkdir()
    (target / "stale.bin").write_text("old")
    (tmp_path / ".final.tmp").mkdir()
    (tmp_path / ".final.tmp" / "half.safetensors").write_text("left by a killed run")
    write_model(policy.loaded, target)
    assert [p.name for p in tmp_path.iterdir()] == ["final"]
    assert not (target / "stale.bin").exists()
    assert not (target / "half.safetensors").exists()
    assert json.loads((target / "config.json").read_text())["architectures"] == ["Qwen3ForCausalLM"]
    assert "groupwise" not in (target / "config.json").read_text()
