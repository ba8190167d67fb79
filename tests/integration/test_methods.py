"""LoRA, QLoRA and the optimisers from the command line: warm-up, GRPO, resume, evaluation, and runs that go wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from groupwise.cli import main
from groupwise.config import ModelConfig
from groupwise.errors import ConfigError, TrainingError
from groupwise.launch import Given, run_sft, run_training
from groupwise.launch.replay import replay_bundle
from groupwise.model.loading import load_model
from groupwise.quickstart.tiny_model import build_tiny_model

ReadRows = Callable[[Path], list[dict[str, Any]]]
NEEDS_BITSANDBYTES = pytest.mark.skipif(
    find_spec("bitsandbytes") is None, reason="needs bitsandbytes: pip install 'groupwise[lowbit]'"
)
MISMATCH = "sampling/sampling_logp_difference/max"


def weights(run: Path) -> bytes:
    [file] = (run / "final").glob("*.safetensors")
    return file.read_bytes()


def mismatches(rows: list[dict[str, Any]]) -> list[float]:
    return [row[MISMATCH] for row in rows]


def test_warm_up_then_grpo_then_evaluation_on_one_adapter(
    task: Any, tmp_path: Path, read_jsonl: ReadRows, capsys: pytest.CaptureFixture[str]
) -> None:
    sft, grpo = tmp_path / "sft", tmp_path / "grpo"
    lora = ("--lora.rank", "4")
    flags = [flag if flag != str(task.rows) else str(task.worked) for flag in task.supervised_flags(sft)]
    assert main(["sft", *flags, *lora, "--sft.rows_per_step", "3", "--train.steps", "3"]) == 0
    names = {path.name for path in (sft / "final").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= names
    assert "model.safetensors" not in names
    warm = load_model(ModelConfig.model_validate({"path": str(sft / "final"), "device": "cpu"}))
    assert any(bool(p.any()) for n, p in warm.model.named_parameters() if ".lora_B." in n)

    start = [*task.flags(grpo, "--train.steps", "3", "--algorithm.kl.coef", "0.1"), "--model", str(sft / "final")]
    assert main(["train", *start]) == 2  # the adapter's rank must be said
    assert "lora.rank = 0, but the adapter has 4; give --lora.rank 4 --lora.alpha 8" in capsys.readouterr().err
    assert main(["train", *start, *lora]) == 0
    rows = read_jsonl(grpo / "metrics.jsonl")
    assert mismatches(rows) == [0.0] * 3
    assert rows[0]["kl"] == 0.0  # against the warmed-up adapter, not against the base
    assert rows[2]["kl"] > 0
    assert weights(grpo) != weights(sft)
    adapter = json.loads((grpo / "final" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(task.model.resolve())

    capsys.readouterr()
    assert main(["eval", str(grpo), "--data", str(task.rows), "--json"]) == 0
    from_run = json.loads(capsys.readouterr().out)
    assert from_run["num_rows"] == 10
    said = []
    for model in (grpo, grpo / "final", sft, task.model):
        assert main(["generate", str(model), "--raw", "--prompt", "say", "--max-tokens", "12"]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    assert len(set(said)) == 3


def test_only_the_adapter_is_in_checkpoints(task: Any, tmp_path: Path) -> None:
    sizes = []
    for name, lora in (("full", {}), ("lora", {"rank": 1})):
        run_training(task.config(tmp_path / name, lora=lora, train={"steps": 1}))
        folder = tmp_path / name / "checkpoints" / "step_000001"
        sizes.append((folder / "policy.safetensors").stat().st_size)
    assert sizes[1] < sizes[0] / 10


@pytest.mark.parametrize(
    "settings",
    [
        {"lora": {"rank": 3, "dropout": 0.3}, "algorithm": {"kl": {"coef": 0.1}}, "model": {"dtype": "bfloat16"}},
        {"lora": {"rank": 8, "rslora": True}, "optim": {"name": "muon", "lr": 0.01}},
        {"optim": {"name": "muon", "lr": 0.01, "weight_decay": 0.1}, "model": {"dtype": "bfloat16"}},
        pytest.param({"optim": {"name": "adamw_8bit", "lr": 0.003}}, marks=NEEDS_BITSANDBYTES),
        pytest.param({"lora": {"rank": 2}, "model": {"quantization": "nf4"}}, marks=NEEDS_BITSANDBYTES),
    ],
    ids=["lora", "lora-muon", "muon", "adamw_8bit", "qlora"],
)
def test_four_steps_are_two_and_two(
    task: Any, tmp_path: Path, read_jsonl: ReadRows, settings: dict[str, dict[str, Any]]
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_training(task.config(whole, **settings, train={"steps": 4}))
    run_training(task.config(parts, **settings, train={"steps": 2}))
    assert weights(parts) != weights(whole)
    run_training(task.config(parts, **settings, train={"steps": 4}), resume=True)
    assert weights(parts) == weights(whole)
    assert (parts / "ledger.jsonl").read_bytes() == (whole / "ledger.jsonl").read_bytes()
    drops = settings.get("lora", {}).get("dropout", 0)
    found = mismatches(read_jsonl(whole / "metrics.jsonl"))
    assert found[0] == 0.0  # a new adapter adds nothing, dropped or not
    assert [mismatch > 0 for mismatch in found[1:]] == [bool(drops)] * 3


@pytest.mark.parametrize("optim", [{"lr": 0.02}, {"name": "muon", "lr": 0.02}], ids=["adamw", "muon"])
def test_an_adapter_learns(task: Any, tmp_path: Path, read_jsonl: ReadRows, optim: dict[str, Any]) -> None:
    run = tmp_path / "run"
    train = {"train": str(task.worked)}
    run_sft(task.config(run, data=train, sft={"rows_per_step": 10}, lora={"rank": 8}, optim=optim, train={"steps": 30}))
    losses = [row["loss"] for row in read_jsonl(run / "metrics.jsonl")]
    assert losses[-1] < 0.5 * losses[0]


def test_a_model_given_from_python_gets_its_adapter(task: Any, tmp_path: Path) -> None:
    loaded = load_model(ModelConfig.model_validate({"path": str(task.model), "device": "cpu"}))
    config = task.config(tmp_path / "run", lora={"rank": 2}, train={"steps": 1})
    run_training(config, given=Given(loaded=loaded))
    assert (tmp_path / "run" / "final" / "adapter_config.json").is_file()
    other = task.config(tmp_path / "other", lora={"rank": 4}, train={"steps": 1})
    with pytest.raises(ConfigError, match=r"lora\.rank = 4, but the adapter has 2"):
        run_training(other, given=Given(loaded=loaded))


def test_a_run_with_a_broken_weight_stops_with_a_bundle_that_replays(task: Any, tmp_path: Path) -> None:
    loaded = load_model(ModelConfig.model_validate({"path": str(task.model), "device": "cpu", "dtype": "float32"}))
    with torch.no_grad():
        loaded.model.get_parameter("model.norm.weight")[5] = torch.inf
    run = tmp_path / "run"
    config = task.config(run, data={"train": str(task.worked)}, sft={"rows_per_step": 3})
    with pytest.raises(TrainingError, match=r"three updates in a row.*bundles/step_000003$"):
        run_sft(config, loaded=loaded)
    assert [folder.name for folder in sorted((run / "bundles").iterdir())] == [
        "step_000001",
        "step_000002",
        "step_000003",
    ]
    assert "everything to reproduce it is in" in (run / "log.txt").read_text()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["updates_skipped"] for row in rows] == [1.0, 1.0]
    content = json.loads((run / "bundles" / "step_000003" / "bundle.json").read_text())
    replayed = replay_bundle(run / "bundles" / "step_000003")
    assert [name for name, gradient in replayed.items() if gradient.num_bad] == content["bad_parameters"] != []


@pytest.mark.slow
def test_distillation_needs_no_reward_and_one_sample(task: Any, tmp_path: Path) -> None:
    """A teacher trained on worked answers, into the model that it began as: its KL falls."""
    teacher, run = tmp_path / "teacher", tmp_path / "run"
    run_sft(task.config(teacher, data={"train": str(task.worked)}, sft={"rows_per_step": 10}, train={"steps": 30}))
    algorithm = {"name": "distill", "teacher": {"path": str(teacher)}}
    rollout = {"group_size": 1, "prompts_per_step": 40}
    optim = {"lr": 0.004}
    run_training(task.config(run, algorithm=algorithm, reward=[], rollout=rollout, optim=optim, train={"steps": 80}))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kl = [-row["credit/teacher_mean"] for row in rows if "credit/teacher_mean" in row]
    assert len(kl) == 80
    assert sum(kl[-10:]) < 0.9 * sum(kl[:10])
    assert all(row["sampling/sampling_logp_difference/max"] == 0.0 for row in rows)


def test_a_teacher_equal_to_the_policy_changes_nothing(task: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    algorithm = {"name": "distill", "teacher": {"path": str(task.model)}}
    run_training(task.config(run, algorithm=algorithm, train={"steps": 2}))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["credit/teacher_mean"] for row in rows] == [0.0, 0.0]
    assert [row["credit/teacher_std"] for row in rows] == [0.0, 0.0]
    assert [row["grad_norm"] for row in rows] == [0.0, 0.0]
    before, after = (load_file(folder / "model.safetensors") for folder in (task.model, run / "final"))
    assert all(torch.equal(before[name], weight) for name, weight in after.items())


def test_a_teacher_with_another_vocabulary_is_refused(task: Any, tmp_path: Path) -> None:
    build_tiny_model(tmp_path / "other", texts=["completely other words " * 9], size="0.1m", vocab_size=300)
    algorithm = {"name": "distill", "teacher": {"path": str(tmp_path / "other")}}
    with pytest.raises(ConfigError, match=r"algorithm\.teacher\.path = .* has another vocabulary"):
        run_training(task.config(tmp_path / "run", algorithm=algorithm))
