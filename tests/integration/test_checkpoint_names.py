"""RUN@STEP wherever a model can be named: the model of a checkpoint is the one that a run stopped there ends with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from groupwise.config import ModelConfig
from groupwise.config.model_name import named_checkpoint
from groupwise.launch.local import run_training
from groupwise.model.checkpoints import write_checkpoint_model
from groupwise.model.loading import load_model, load_tokenizer
from groupwise.sft import run_sft

SAVING = {"save_every": 1, "keep_checkpoints": 9}
LORA = {"rank": 2, "target_modules": ["q_proj", "down_proj"]}


def loaded(path: object, **settings: Any) -> dict[str, torch.Tensor]:
    config = ModelConfig.model_validate({"path": str(path), "device": "cpu", **settings})
    return dict(load_model(config).model.state_dict())


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one)


def written(checkpoint: str, folder: Path) -> dict[str, bytes]:
    named = named_checkpoint(checkpoint)
    assert named is not None
    write_checkpoint_model(named, folder)
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def adapter(task: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of LoRA: its final/ is an adapter that other runs can go on with."""
    run = tmp_path_factory.mktemp("adapter") / "run"
    run_training(task.config(run, lora=LORA, train={"steps": 1}))
    return run


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["whole", "lora", "adapter", "sft"])
def test_a_checkpoint_is_the_final_model_of_a_run_that_ended_there(
    task: Any, tmp_path: Path, adapter: Path, kind: str, dtype: str
) -> None:
    sections: dict[str, Any] = {"model": {"dtype": dtype}}
    if kind == "adapter":
        sections["model"]["path"] = str(adapter / "final")
    if kind in ("lora", "adapter"):
        sections["lora"] = LORA
    if kind == "sft":
        sections |= {"data": {"train": str(task.worked)}, "sft": {"rows_per_step": 4}}
    start = run_sft if kind == "sft" else run_training
    long, short = tmp_path / "long", tmp_path / "short"
    start(task.config(long, **sections, train={"steps": 3, **SAVING}))
    start(task.config(short, **sections, train={"steps": 2}))
    files = {file.name: file.read_bytes() for file in sorted((short / "final").iterdir())}
    assert written(f"{long}@2", tmp_path / "written") == files
    assert written(f"{long}@latest", tmp_path / "newest") != files
    for asked in ("float32", "bfloat16"):
        same(loaded(f"{long}@2", dtype=asked), loaded(short / "final", dtype=asked))
    same(loaded(long / "checkpoints" / "step_000002"), loaded(short / "final"))
    one, other = (load_tokenizer(ModelConfig.model_validate({"path": str(p)})) for p in (f"{long}@2", short / "final"))
    assert one.encode("2 + 2 = <4>") == other.encode("2 + 2 = <4>")
    assert one.chat_template == other.chat_template
