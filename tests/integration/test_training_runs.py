"""Real runs of a tiny model: they learn, their directories are complete, sampler and trainer agree, models load."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from groupwise.cli import main
from groupwise.config import ModelConfig, RolloutConfig
from groupwise.engines.native import NativeEngine
from groupwise.errors import Interrupted
from groupwise.inputs import ModelInput
from groupwise.launch import Given, run_sft, run_training
from groupwise.model.loading import load_model
from groupwise.trajectories import read_trajectories, to_json
from groupwise.types import Prompt, SampleRequest, SamplingParams
from groupwise.watching import Unwatched
from groupwise.wishes import WishName, leave_wish

ReadRows = Callable[[Path], list[dict[str, Any]]]
MISMATCH = "sampling/sampling_logp_difference/"


def agrees(rows: list[dict[str, Any]]) -> bool:
    return all(row[f"{MISMATCH}max"] == 0.0 == row[f"{MISMATCH}mean"] for row in rows if row["step"])


def test_grpo_raises_the_reward(task: Any, tmp_path: Path, read_jsonl: ReadRows) -> None:
    run = tmp_path / "run"
    config = task.config(
        run,
        train={"steps": 16},
        optim={"lr": 0.01},
        rollout={"group_size": 8},
        eval={"every": 8},
        data={"eval": str(task.rows)},
    )
    summary = run_training(config)
    rows = read_jsonl(run / "metrics.jsonl")
    rewards = [row["reward"] for row in rows if row["step"]]
    assert sum(rewards[:2]) / 2 < 0.65
    assert sum(rewards[-3:]) / 3 > 0.85
    assert agrees(rows)
    assert [row["step"] for row in rows] == list(range(17))
    assert [e["step"] for e in summary["eval"]] == [0, 8, 16]


def test_a_run_directory_is_complete(task: Any, tmp_path: Path, read_jsonl: ReadRows) -> None:
    run = tmp_path / "run"
    config = task.config(run, tracking={"backends": ["jsonl", "tensorboard", "console"]}, train={"save_every": 2})
    summary = run_training(config)
    names = {path.name for path in run.iterdir()}
    # Answers of 8 tokens are all cut, which is a finding.
    files = ["config.json", "versions.json", "log.txt", "metrics.jsonl", "ledger.jsonl", "findings.jsonl"]
    folders = ["trajectories", "checkpoints", "final", "tensorboard"]
    assert names == {*files, *folders, "trust.json", "summary.json", ".lock.1"}
    assert json.loads((run / "summary.json").read_text()) == summary
    assert summary["steps"] == 4
    assert json.loads((run / "config.json").read_text())["train"]["seed"] == 3

    rows = read_jsonl(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert agrees(rows)
    wanted = {"reward", "reward_std", "grad_norm", "learning_rate", "completions/mean_length", "time/rollout", "loss"}
    assert wanted | {"rewards/low/mean", "time/step", "throughput/tokens_per_second"} <= set(rows[0])

    ledger = read_jsonl(run / "ledger.jsonl")
    assert [(row["step"], row["group"]) for row in ledger] == [(k // 4 + 1, k) for k in range(16)]
    assert {row["samples"] for row in ledger} == {4}
    assert all(row["policy_version"] == row["step"] - 1 for row in ledger)
    first_epoch = [row["uid"] for row in ledger[:10]]
    assert len(set(first_epoch)) == 10

    assert sorted(p.name for p in (run / "trajectories").iterdir()) == [f"step_00000{k}.jsonl" for k in (1, 2, 3, 4)]
    file = run / "trajectories" / "step_000003.jsonl"
    trajectories = list(read_trajectories(run, steps=[3]))
    assert [to_json(row) for row in trajectories] == read_jsonl(file), "what was written is what is read"
    assert len(trajectories) == 16
    assert {row.policy_version for row in trajectories} == {2}
    assert all(row.reward is not None and 0 <= row.reward <= 1 and row.status == "ok" for row in trajectories)
    assert sum(row.completion_tokens for row in trajectories) / 16 == rows[2]["completions/mean_length"]
    assert [row.draw for row in read_trajectories(run)] == [0] * 40 + [1] * 24, "4 samples of 10 prompts, and again"
    assert (run / "checkpoints" / "latest").read_text().strip() == "step_000004"


def test_supervised_loss_falls_and_the_model_answers(task: Any, tmp_path: Path, read_jsonl: ReadRows) -> None:
    run = tmp_path / "sft"
    config = task.config(
        run, data={"train": str(task.worked)}, optim={"lr": 0.01}, sft={"rows_per_step": 10}, train={"steps": 30}
    )
    summary = run_sft(config)
    losses = [row["loss"] for row in read_jsonl(run / "metrics.jsonl")]
    assert len(losses) == 30
    assert losses[0] == pytest.approx(math.log(259), rel=0.1)
    assert losses[-1] < 0.5
    assert summary["loss"] == losses[-1]
    _same_greedy_text(run / "final", [f"say {word}:" for word in ("red", "Käse", "two", "unseen")])


def _same_greedy_text(folder: Path, texts: list[str]) -> None:
    """transformers and the built-in engine read the same folder and write the same answers."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert model.config._attn_implementation != "groupwise"
    engine = NativeEngine(
        load_model(ModelConfig.model_validate({"path": str(folder), "dtype": "float32", "device": "cpu"})),
        RolloutConfig.model_validate({}),
    )

    async def answer(text: str) -> str:
        prompt = Prompt(text, (), text, ModelInput.of(tuple(tokenizer.encode(text))))
        request = SampleRequest.of(prompt, 0, SamplingParams(temperature=0.0, max_tokens=12))
        (completion,) = [c async for c in engine.generate([request])]
        return completion.text

    answers = []
    for text in texts:
        ids = torch.tensor([tokenizer.encode(text)])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12)  # pyright: ignore[reportAttributeAccessIssue]
        expected = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        answers.append(asyncio.run(answer(text)))
        assert answers[-1] == expected
    assert answers[0] == " red"


def test_a_final_model_is_trained_further(task: Any, tmp_path: Path, read_jsonl: ReadRows) -> None:
    run_training(task.config(tmp_path / "one", train={"steps": 1}))
    second = task.config(tmp_path / "two", model={"path": str(tmp_path / "one" / "final")}, train={"steps": 1})
    run_training(second)
    assert agrees(read_jsonl(tmp_path / "two" / "metrics.jsonl"))


@pytest.mark.parametrize(
    "sections",
    [
        {"model": {"dtype": "bfloat16"}},
        {"model": {"gradient_checkpointing": True}},
        {"algorithm": {"kl": {"coef": 0.1}}},
        {"algorithm": {"entropy": {"coef": 0.01}}},
        {"optim": {"steps_per_batch": 2, "weight_decay": 0.1, "schedule": "cosine", "warmup_ratio": 0.3}},
        {"algorithm": {"name": "dapo"}, "rollout": {"temperature": 0.7, "top_p": 0.9, "top_k": 50}},
        {"algorithm": {"name": "gspo"}, "rollout": {"prompts_per_step": 25}},
        {"train": {"micro_batch_tokens": 1}},
    ],
    ids=lambda sections: "-".join(key for section in sections.values() for key in section),
)
def test_variants_run_and_agree(task: Any, tmp_path: Path, read_jsonl: ReadRows, sections: dict[str, Any]) -> None:
    run = tmp_path / "run"
    sections = {**sections, "train": {"steps": 2, **sections.get("train", {})}}
    run_training(task.config(run, **sections))
    rows = read_jsonl(run / "metrics.jsonl")
    assert len(rows) == 2
    assert agrees(rows)
    assert all(row["grad_norm"] > 0 for row in rows)
    if "kl" in sections.get("algorithm", {}):
        assert rows[0]["kl"] == 0.0
        assert rows[1]["kl"] > 0
    if "steps_per_batch" in sections.get("optim", {}):
        assert rows[0]["learning_rate"] > 0
    model = AutoModelForCausalLM.from_pretrained(run / "final")
    expected = torch.bfloat16 if sections.get("model", {}).get("dtype") == "bfloat16" else torch.float32
    assert model.dtype == expected


def test_gradient_checkpointing_changes_no_weight(task: Any, tmp_path: Path) -> None:
    weights = []
    for on in (False, True):
        run_training(task.config(tmp_path / str(on), model={"gradient_checkpointing": on}, train={"steps": 2}))
        weights.append((tmp_path / str(on) / "final" / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_the_same_config_gives_the_same_run_and_another_seed_another(task: Any, tmp_path: Path) -> None:
    ledgers = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        run_training(task.config(tmp_path / name, train={"steps": 2, "seed": seed}))
        ledgers.append((tmp_path / name / "ledger.jsonl").read_text())
    assert ledgers[0] == ledgers[1] != ledgers[2]


def test_a_program_gives_objects_in_place_of_names(task: Any, tmp_path: Path, read_jsonl: ReadRows) -> None:
    def length(completions: list[str], answer: list[str], **columns: Any) -> list[float]:
        assert answer == ["x"] * len(completions)
        return [float(len(text)) for text in completions]

    run = tmp_path / "run"
    config = task.config(run, model={"path": ""}, data={"train": ""}, reward=[], train={"steps": 2})
    loaded = load_model(ModelConfig.model_validate({"path": str(task.model), "device": "cpu", "dtype": "float32"}))
    data = [{"prompt": f"go {k}", "answer": "x"} for k in range(4)]
    run_training(config, given=Given(loaded=loaded, train_data=data, rewards=[length]))
    rows = read_jsonl(run / "metrics.jsonl")
    assert agrees(rows)
    assert "rewards/length/mean" in rows[0]


@pytest.mark.parametrize("name", ["raises", "hangs", "nan", "wrong_length"])
def test_a_run_outlives_a_reward_that_always_fails(task: Any, tmp_path: Path, read_jsonl: ReadRows, name: str) -> None:
    run = tmp_path / "run"
    reward = {"name": task.reward(name), "timeout": 0.3}
    train = {"steps": 2, "stop_after_empty_steps": 0}
    summary = run_training(task.config(run, reward=[reward], rollout={"prompts_per_step": 2}, train=train))
    assert summary["steps"] == 2
    rows = read_jsonl(run / "metrics.jsonl")
    assert [row["rollout/failed"] for row in rows] == [8, 8]
    assert [row[f"rewards/{name}/errors"] for row in rows] == [8, 8]
    assert all("reward" not in row for row in rows)
    trajectories = list(read_trajectories(run, steps=[1]))
    assert len(trajectories) == 8
    assert all(row.status == "failed" and row.boundary == "reward" and name in row.cause for row in trajectories)
    before = AutoModelForCausalLM.from_pretrained(task.model)
    after = AutoModelForCausalLM.from_pretrained(run / "final")
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))


def test_a_reward_that_never_applies_is_no_failure(task: Any, tmp_path: Path, read_jsonl: ReadRows) -> None:
    run = tmp_path / "run"
    train = {"steps": 2, "stop_after_empty_steps": 0}
    run_training(task.config(run, reward=[{"name": task.reward("nothing")}], train=train))
    rows = read_jsonl(run / "metrics.jsonl")
    assert [row["rollout/failed"] for row in rows] == [0, 0]
    assert all("reward" not in row for row in rows)


def test_values_that_are_no_rewards_fail_their_own_rollouts_alone(
    task: Any, tmp_path: Path, read_jsonl: ReadRows
) -> None:
    run = tmp_path / "run"
    run_training(task.config(run, reward=[{"name": task.reward("half")}], train={"steps": 2}))
    rows = read_jsonl(run / "metrics.jsonl")
    assert [row["rollout/failed"] for row in rows] == [8, 8]
    assert agrees(rows)
    assert all(row["grad_norm"] > 0 for row in rows)


class Beside(Unwatched):
    """Somebody beside the run, who asks for something after these steps."""

    def __init__(self, run: Path, wishes: dict[int, WishName]) -> None:
        self._run, self._wishes = run, wishes

    def updated(self, step: int) -> bool:
        if name := self._wishes.get(step):
            leave_wish(self._run, name)
        return False


def test_what_is_asked_beside_the_run_is_done_after_the_step(task: Any, tmp_path: Path, read_jsonl: ReadRows) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    run_training(task.config(whole, train={"steps": 5}))
    config = task.config(run, train={"steps": 5})
    with pytest.raises(Interrupted, match="stopped after step 4"):
        run_training(config, given=Given(watcher=Beside(run, {2: "save", 4: "stop"})))
    saved = sorted(path.name for path in (run / "checkpoints").glob("step_*"))
    assert saved[-2:] == ["step_000002", "step_000004"]
    assert not list(run.glob("wish.*"))
    leave_wish(run, "stop")  # of the run that is no more
    run_training(config, resume=True)
    assert read_jsonl(run / "ledger.jsonl") == read_jsonl(whole / "ledger.jsonl")
    weights = [(folder / "final/model.safetensors").read_bytes() for folder in (whole, run)]
    assert weights[0] == weights[1]


def test_where_settings_came_from_is_kept(task: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = Path("recipe.toml")
    recipe.write_text(
        f"[optim]\nlr = 0.002\n[train]\nsteps = 1\n[rollout]\ngroup_size = 2\nprompts_per_step = 2\n"
        f'max_completion_tokens = 4\n[data]\ntrain = "{task.rows}"\n'
    )
    flags = ["--model", str(task.model), "--model.device", "cpu", "--reward", task.reward("low"), "--output", "run"]
    assert main(["train", "recipe.toml", *flags, "--train.seed", "5"]) == 0
    origins = json.loads(Path("run/origins.json").read_text())
    assert origins["optim.lr"] == "recipe.toml"
    assert origins["train.seed"] == origins["model.path"] == "command line"
    assert "optim.betas" not in origins
    flags = ["--train.steps", "2", "--trust-rewards"]
    assert main(["train", "--resume", "--output", "run", *flags]) == 0
    again = json.loads(Path("run/origins.json").read_text())
    assert again["train.steps"] == "command line"
    assert again["optim.lr"] == "recipe.toml"


def test_rewards_are_checked_over_what_a_run_has_sampled(
    task: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run_training(task.config(run, train={"steps": 2}))
    rows = [row for row in read_trajectories(run) if row.reward is not None]
    capsys.readouterr()
    assert main(["reward", "check", "--run", str(run), "--json", "--fail-on", "none"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["answers"] == len(rows) == 32
    assert found["rewards"][0]["name"] == "low"
    assert found["rewards"][0]["mean"] == pytest.approx(sum(row.reward or 0.0 for row in rows) / len(rows))
    assert found["best"][0]["rewards"]["low"] == max(row.reward or 0.0 for row in rows)
