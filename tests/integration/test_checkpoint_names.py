"""RUN@STEP wherever a model can be named: the model of a checkpoint is the one that a run stopped there ends with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from groupwise.cli import main
from groupwise.config import ModelConfig
from groupwise.config.model_name import named_checkpoint
from groupwise.errors import ConfigError
from groupwise.launch import run_sft, run_training
from groupwise.model.checkpoints import keep_base, write_checkpoint_model
from groupwise.model.loading import load_model, load_tokenizer

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


# --- in the commands ---


@pytest.fixture(scope="module")
def runs(task: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`whole` and `lora`, three steps each with all checkpoints and no final/; `short` ended after two."""
    folder = tmp_path_factory.mktemp("runs")
    for name, sections in (("whole", {}), ("lora", {"lora": LORA})):
        run_training(task.config(folder / name, **sections, train={"steps": 3, **SAVING}))
        shutil.rmtree(folder / name / "final")
    run_training(task.config(folder / "short", train={"steps": 2}))
    return folder


def said(capsys: pytest.CaptureFixture[str], *words: object, code: int = 0) -> str:
    capsys.readouterr()
    assert main([str(word) for word in words]) == code
    captured = capsys.readouterr()
    return captured.out if code == 0 else captured.err


def test_generate_and_eval_take_a_checkpoint(runs: Path, task: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def answer(model: object) -> str:
        return said(capsys, "generate", model, "--prompt", "1 + 1 =", "--raw", "--max-tokens", 20, "--seed", 3)

    def score(model: object) -> dict[str, Any]:
        flags = ("--data", task.rows, "--reward", task.reward("low"), "--max-completion-tokens", 8, "--json")
        found = json.loads(said(capsys, "eval", model, *flags, "--temperature", 1))
        return {name: value for name, value in found.items() if name not in ("model", "seconds")}

    assert answer(f"{runs}/whole@2") == answer(runs / "short") != answer(f"{runs}/whole@1")
    assert score(f"{runs}/whole@2") == score(runs / "short")
    assert answer(runs / "whole") == answer(f"{runs}/whole@latest") == answer(f"{runs}/whole@3")
    assert "are of the steps 1, 2, 3" in said(capsys, "generate", f"{runs}/whole@9", "--prompt", "x", code=2)


@pytest.mark.slow
def test_exports_come_out_of_a_checkpoint(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said(capsys, "export", "hf", f"{runs}/whole@2", "--out", tmp_path / "whole")
    same(loaded(tmp_path / "whole"), loaded(runs / "short" / "final"))
    assert "| `reward` |" in (tmp_path / "whole" / "README.md").read_text()
    assert "- steps: 2, seed 3" in (tmp_path / "whole" / "README.md").read_text()
    assert "20 of 20" in said(capsys, "export", "verify", tmp_path / "whole")
    said(capsys, "export", "hf", f"{runs}/lora@2", "--out", tmp_path / "adapter", "--form", "adapter")
    same(loaded(tmp_path / "adapter"), loaded(f"{runs}/lora@2"))
    said(capsys, "export", "hf", runs / "lora" / "checkpoints" / "step_000002", "--out", tmp_path / "merged")
    assert "20 of 20" in said(capsys, "export", "verify", tmp_path / "merged")
    assert "20 of 20" in said(capsys, "export", "verify", tmp_path / "merged", "--source", f"{runs}/lora@2")
    said(capsys, "export", "card", f"{runs}/lora@2", "--out", tmp_path / "card.md")
    for words, message in (
        (("export", "card", f"{runs}/lora@2"), "name a file with --out"),
        (("export", "push", f"{runs}/lora@2", "--repo", "me/x"), "export hf"),
        (("export", "hf", f"{runs}/whole@2", "--out", tmp_path / "no", "--base", "x"), "leave --base out"),
    ):
        assert message in said(capsys, *words, code=2)
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("lora", [{}, LORA])
def test_a_run_begins_with_a_checkpoint_and_outlives_it(task: Any, runs: Path, tmp_path: Path, lora: Any) -> None:
    """It has a copy of what it began with, so it can be resumed, and its own checkpoints be named, without that."""
    source = tmp_path / "source"
    shutil.copytree(runs / "whole", source)
    sections = {"model": {"path": f"{source}@latest"}, "lora": lora}
    same_model = {"model": {"path": f"{tmp_path}/written"}, "lora": lora}
    written(f"{source}@3", tmp_path / "written")
    run_training(task.config(tmp_path / "expected", **same_model, train={"steps": 4}))
    run_training(task.config(tmp_path / "run", **sections, train={"steps": 2, "save_every": 1}))
    assert json.loads((tmp_path / "run" / "config.json").read_text())["model"]["path"] == f"{source}@3"
    shutil.rmtree(source)
    sections["model"]["path"] = f"{source}@3"
    run_training(task.config(tmp_path / "run", **sections, train={"steps": 4}), resume=True)
    files = [next((tmp_path / name / "final").glob("*.safetensors")) for name in ("run", "expected")]
    assert files[0].read_bytes() == files[1].read_bytes()
    same(loaded(f"{tmp_path}/run@4"), loaded(tmp_path / "run" / "final"))
    if lora:
        base = json.loads((tmp_path / "run" / "final" / "adapter_config.json").read_text())["base_model_name_or_path"]
        assert Path(base) == tmp_path / "run" / "base"


def test_training_goes_on_with_an_adapter_of_a_checkpoint(task: Any, runs: Path, tmp_path: Path) -> None:
    sections = {"model": {"path": f"{runs}/lora@2"}, "lora": LORA}
    run_training(task.config(tmp_path / "run", **sections, train={"steps": 1}))
    assert (tmp_path / "run" / "final" / "adapter_model.safetensors").is_file()
    same(loaded(f"{tmp_path}/run@1"), loaded(tmp_path / "run" / "final"))


def test_the_doors_take_a_checkpoint(task: Any, runs: Path, tmp_path: Path) -> None:
    from groupwise.compat.trl import GRPOConfig, GRPOTrainer
    from groupwise.compat.unsloth import FastLanguageModel

    args = GRPOConfig(
        output_dir=str(tmp_path / "trl"),
        max_steps=1,
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=4,
        report_to="none",
        use_cpu=True,
    )
    rows = [{"prompt": f"{number} + 1 ="} for number in range(4)]
    trainer = GRPOTrainer(
        model=f"{runs}/whole@2", reward_funcs=lambda completions, **_: [1.0] * 4, args=args, train_dataset=rows
    )
    weights = dict(trainer.model.state_dict())
    assert all(torch.equal(weight, weights[name]) for name, weight in loaded(runs / "short" / "final").items())
    trainer.train()
    run = tmp_path / "trl" / "run"
    same(loaded(run / "base"), loaded(runs / "short" / "final"))
    config = ModelConfig.model_validate({"path": f"{tmp_path}/gone@2", "device": "cpu"})
    keep_base(load_model(config.model_copy(update={"path": str(run / "final")})), config, run)
    same(loaded(run / "base"), loaded(runs / "short" / "final"))  # a resumed run keeps the one it has
    for name in ("whole@2", "lora@2"):
        model, _ = FastLanguageModel.from_pretrained(f"{runs}/{name}", load_in_4bit=False, dtype=torch.float32)
        expected = loaded(f"{runs}/{name}")
        found = {key.removeprefix("base_model.model."): value for key, value in model.state_dict().items()}
        assert all(torch.equal(value, found[key]) for key, value in expected.items())


def test_what_cannot_be_laid_over_a_base_is_refused(task: Any, runs: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds whole weights, which are packed when a model folder is read"):
        load_model(ModelConfig.model_validate({"path": f"{runs}/whole@2", "quantization": "nf4"}))
    shutil.copytree(runs / "whole", tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["lora"]["rank"] = 2
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="do not belong to the model that its run began with"):
        load_model(ModelConfig.model_validate({"path": f"{tmp_path}/run@2"}))


# --- the best one ---


def evaluated(task: Any, output: Path, **train: Any) -> Any:
    sections: dict[str, Any] = {
        "data": {"train": str(task.rows), "eval": str(task.rows)},
        "eval": {"every": 1, "limit": 2, "temperature": 1.0},
    }
    best = {"keep_best": "eval/reward", "keep_checkpoints": 1}
    return task.config(output, **sections, train={"steps": 6, **best, **train})


def test_the_best_checkpoint_is_kept_also_over_a_resume(task: Any, tmp_path: Path) -> None:
    run_training(evaluated(task, tmp_path / "whole"))
    rows = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    rewards = {row["step"]: row["eval/reward"] for row in rows if row["step"] > 0}
    best = next(step for step, reward in rewards.items() if reward == max(rewards.values()))
    assert best < 6, "the task would show nothing"
    found = named_checkpoint(f"{tmp_path}/whole@best")
    assert found is not None
    assert found.step == best
    assert sorted(p.name for p in (tmp_path / "whole" / "checkpoints").glob("step_*")) == [
        f"step_{best:06d}",
        "step_000006",
    ]
    run_training(evaluated(task, tmp_path / "parts", steps=3))
    (tmp_path / "parts" / "checkpoints" / "best").unlink()
    run_training(evaluated(task, tmp_path / "parts"), resume=True)
    again = named_checkpoint(f"{tmp_path}/parts@best")
    assert again is not None
    assert again.step == best
    same(loaded(f"{tmp_path}/parts@best"), loaded(f"{tmp_path}/whole@best"))


def test_a_best_that_nothing_measures_is_refused(task: Any, tmp_path: Path) -> None:
    for metric, message in (("eval/acuracy", "eval/rewards/low/mean"), ("reward", "expected one of eval/accuracy")):
        with pytest.raises(ConfigError, match=message):
            run_training(evaluated(task, tmp_path / "run", keep_best=metric))
    config = task.config(tmp_path / "run", train={"keep_best": "eval/accuracy"})
    with pytest.raises(ConfigError, match="nothing is evaluated"):
        run_training(config)
    sft = task.config(tmp_path / "run", data={"train": str(task.worked)}, train={"keep_best": "eval/accuracy"})
    with pytest.raises(ConfigError, match="supervised training evaluates nothing"):
        run_sft(sft)
    assert not (tmp_path / "run").exists()
