"""Settings of the algorithm in whole runs: each changes the run in the way that it says, and none breaks a resume."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from groupwise.errors import ConfigError
from groupwise.launch import run_training
from groupwise.policy import Learner
from groupwise.trajectories import read_trajectories

ReadRows = Callable[[Path], list[dict[str, Any]]]
MISMATCH = "sampling/sampling_logp_difference/"
PICKY = """
def first(completion_ids, **columns):
    return [float(ids[0] % 8 == 0) for ids in completion_ids]
"""


def weights(run: Path) -> bytes:
    return (run / "final" / "model.safetensors").read_bytes()


def train(task: Any, run: Path, **sections: Any) -> list[dict[str, Any]]:
    """A run's metrics, by step; sampler and trainer must agree whatever the settings."""
    run_training(task.config(run, **sections))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert all(row[f"{MISMATCH}max"] == 0.0 == row[f"{MISMATCH}mean"] for row in rows if f"{MISMATCH}max" in row)
    assert any(f"{MISMATCH}max" in row for row in rows)
    return rows


@pytest.fixture
def picky(task: Any, tmp_path: Path) -> dict[str, Any]:
    """A reward that one answer in eight earns, so that many groups earn nothing."""
    file = tmp_path / "picky.py"
    file.write_text(PICKY)
    return {"name": f"{file}:first"}


# --- old log-probs and corrections ---


@pytest.mark.parametrize(
    "algorithm",
    [
        {"correction": {"name": "truncate"}},
        {"correction": {"name": "mask", "level": "geometric"}},
        {"name": "gspo", "correction": {"name": "decoupled", "veto": 0.5}},
    ],
    ids=str,
)
def test_recomputed_logprobs_are_the_samplers_bit_by_bit(task: Any, tmp_path: Path, algorithm: dict[str, Any]) -> None:
    plain = {key: value for key, value in algorithm.items() if key != "correction"}
    optim = {"lr": 0.003, "steps_per_batch": 2}
    train(task, tmp_path / "a", algorithm=plain, optim=optim, train={"steps": 2})
    rows = train(
        task, tmp_path / "b", algorithm={**algorithm, "old_logprobs": "policy"}, optim=optim, train={"steps": 2}
    )
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    assert [row["correction/weight_mean"] for row in rows] == [1.0, 1.0]
    assert [row["correction/dropped"] for row in rows] == [0.0, 0.0]


@pytest.mark.parametrize(("old_logprobs", "forwards"), [("auto", 0), ("sampler", 0), ("policy", 4)])
def test_the_policy_computes_old_logprobs_only_when_asked(
    task: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old_logprobs: str, forwards: int
) -> None:
    calls = []
    real = Learner.log_probs

    def counted(self: Learner, rows: Any, **at: Any) -> torch.Tensor:
        calls.append(len(rows))
        return real(self, rows, **at)

    monkeypatch.setattr(Learner, "log_probs", counted)
    train(task, tmp_path / "a", algorithm={"old_logprobs": old_logprobs}, train={"micro_batch_tokens": 10_000})
    assert len(calls) == forwards


def test_an_off_policy_mask_drops_what_has_drifted(task: Any, tmp_path: Path) -> None:
    optim = {"lr": 0.02, "steps_per_batch": 4}
    rows = train(task, tmp_path / "a", algorithm={"correction": {"off_policy_mask": 1e-4}}, optim=optim)
    assert max(row["correction/dropped"] for row in rows) > 0
    train(task, tmp_path / "b", optim=optim)
    assert weights(tmp_path / "a") != weights(tmp_path / "b")


def test_a_correction_with_nothing_to_correct_is_refused_before_a_run_begins(task: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"algorithm\.old_logprobs to 'policy'"):
        run_training(task.config(tmp_path / "a", algorithm={"correction": {"name": "truncate"}}))
    assert not (tmp_path / "a").exists()


def test_filters_are_remarked_on_in_the_log(task: Any, tmp_path: Path) -> None:
    train(task, tmp_path / "a", rollout={"top_p": 0.9}, train={"steps": 1})
    train(task, tmp_path / "b", train={"steps": 1})
    assert "rollout.top_p = 0.9: samples come from a filtered distribution" in (tmp_path / "a" / "log.txt").read_text()
    assert "filtered distribution" not in (tmp_path / "b" / "log.txt").read_text()


# --- KL and reference ---


# k1 in the loss is left out: its gradient is zero on average.
@pytest.mark.parametrize(
    ("place", "estimator"), [("loss", "k2"), ("loss", "k3"), ("reward", "k1"), ("reward", "k2"), ("reward", "k3")]
)
def test_a_kl_holds_the_policy_back(task: Any, tmp_path: Path, place: str, estimator: str) -> None:
    kl = {"place": place, "estimator": estimator}
    optim, length = {"lr": 0.005}, {"steps": 8}
    free = train(
        task, tmp_path / "free", algorithm={"name": "dr_grpo", "kl": {"coef": 1e-9, **kl}}, optim=optim, train=length
    )
    held = train(
        task, tmp_path / "held", algorithm={"name": "dr_grpo", "kl": {"coef": 1.0, **kl}}, optim=optim, train=length
    )
    assert free[0]["kl"] == 0.0 == held[0]["kl"]
    assert held[-1]["kl"] < free[-1]["kl"] / 1.2
    assert ("reward_kl_penalty" in held[0]) == (place == "reward")


def test_a_reference_follows_when_it_is_due(task: Any, tmp_path: Path) -> None:
    rows = train(
        task,
        tmp_path / "a",
        algorithm={"kl": {"coef": 0.01}, "reference": {"sync_every": 2, "mixup": 1.0}},
        train={"steps": 5},
    )
    assert [row["kl"] == 0.0 for row in rows] == [True, False, True, False, True]


# --- entropy ---


def test_an_adaptive_bonus_rises_while_entropy_is_below_the_target(task: Any, tmp_path: Path) -> None:
    low, high = (
        train(
            task,
            tmp_path / str(target),
            algorithm={"entropy": {"coef": 0.05, "target": target, "coef_step": 0.01}},
            train={"steps": 3},
        )
        for target in (0.1, 100.0)
    )
    assert [row["entropy_coef"] for row in high] == pytest.approx([0.05, 0.06, 0.07])
    assert [row["entropy_coef"] for row in low] == pytest.approx([0.05, 0.0, 0.0])
    assert high[-1]["entropy"] > low[-1]["entropy"]


def test_a_top_entropy_filter_changes_what_is_learned(task: Any, tmp_path: Path) -> None:
    for fraction in (1.0, 0.2):
        train(task, tmp_path / str(fraction), algorithm={"entropy": {"top_fraction": fraction}}, train={"steps": 1})
    assert weights(tmp_path / "1.0") != weights(tmp_path / "0.2")


# --- overlong ---


def test_nothing_is_learned_from_truncated_completions_alone(task: Any, tmp_path: Path) -> None:
    sections = {
        "rollout": {"max_completion_tokens": 1},
        "optim": {"lr": 0.003, "weight_decay": 0.0},
        "train": {"steps": 1, "stop_after_empty_steps": 0},
    }
    kept = train(task, tmp_path / "keep", **sections)
    run_training(task.config(tmp_path / "mask", algorithm={"overlong": "mask"}, **sections))
    assert kept[0]["completions/clipped_ratio"] == 1.0
    before = load_file(task.model / "model.safetensors")
    after = load_file(tmp_path / "mask" / "final" / "model.safetensors")
    assert all(torch.equal(after[name], before[name]) for name in after)
    assert weights(tmp_path / "keep") != weights(tmp_path / "mask")


def test_the_soft_penalty_is_a_reward(task: Any, tmp_path: Path) -> None:
    reward = [{"name": task.reward("low")}, {"name": "overlong", "args": {"max_tokens": 8, "buffer_tokens": 4}}]
    rows = train(task, tmp_path / "a", reward=reward, train={"steps": 1})
    assert -1 <= rows[0]["rewards/overlong/mean"] < 0


# --- dynamic sampling ---


def test_groups_that_teach_nothing_are_replaced(
    task: Any, tmp_path: Path, picky: dict[str, Any], read_jsonl: ReadRows
) -> None:
    train(task, tmp_path / "plain", reward=[picky], train={"steps": 3})
    rows = train(task, tmp_path / "a", reward=[picky], rollout={"dynamic_sampling_cap": 4}, train={"steps": 3})
    assert weights(tmp_path / "plain") != weights(tmp_path / "a")
    ledger = read_jsonl(tmp_path / "a" / "ledger.jsonl")
    assert [row["group"] for row in ledger] == list(range(len(ledger)))
    assert any(not row["learned"] for row in ledger)
    for step, row in enumerate(rows, 1):
        own = [entry for entry in ledger if entry["step"] == step]
        learned = sum(entry["learned"] for entry in own)
        assert row["dynamic_sampling/sampled"] == len(own) <= 16
        assert row["dynamic_sampling/dropped"] == len(own) - learned
        assert row["dynamic_sampling/missing"] == 4 - learned
        assert learned == 4 or len(own) == 16
        assert {entry["policy_version"] for entry in own} == {step - 1}
        assert len(list(read_trajectories(tmp_path / "a", steps=[step]))) == 4 * len(own)


def test_a_reward_that_never_differs_reaches_the_cap_and_trains_on(task: Any, tmp_path: Path) -> None:
    file = tmp_path / "same.py"
    file.write_text("def same(completions, **columns):\n    return [1.0] * len(completions)\n")
    run_training(
        task.config(
            tmp_path / "a",
            reward=[{"name": f"{file}:same"}],
            rollout={"dynamic_sampling_cap": 2},
            optim={"lr": 0.003, "steps_per_batch": 2},
            train={"steps": 2},
        )
    )
    log = (tmp_path / "a" / "log.txt").read_text()
    assert log.count("of 8 prompts sampled teach something") == 2


# --- resume ---


@pytest.mark.parametrize(
    "sections",
    [
        {"algorithm": {"kl": {"coef": 0.1}, "reference": {"sync_every": 2, "mixup": 0.3}, "entropy": {"target": 9.0}}},
        {
            "algorithm": {"kl": {"coef": 0.1, "place": "reward"}, "reference": {"sync_every": 1}},
            "model": {"dtype": "bfloat16"},
        },
        {
            "algorithm": {"old_logprobs": "policy", "correction": {"name": "decoupled"}},
            "optim": {"lr": 0.003, "steps_per_batch": 2},
        },
        {"rollout": {"dynamic_sampling_cap": 3}, "algorithm": {"overlong": "mask"}},
    ],
    ids=["reference-entropy", "kl-in-reward", "recomputed", "dynamic-sampling"],
)
def test_six_steps_are_three_and_three(
    task: Any, tmp_path: Path, picky: dict[str, Any], sections: dict[str, Any]
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    sections = {"reward": [picky], **sections}
    run_training(task.config(whole, **sections, train={"steps": 6}))
    run_training(task.config(parts, **sections, train={"steps": 3}))
    run_training(task.config(parts, **sections, train={"steps": 6}), resume=True)
    assert weights(whole) == weights(parts)
    assert (whole / "ledger.jsonl").read_bytes() == (parts / "ledger.jsonl").read_bytes()
    for file in (whole / "trajectories").iterdir():
        assert file.read_bytes() == (parts / "trajectories" / file.name).read_bytes()
