"""A run directory of any size, written as a run writes it, without a model."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from groupwise.config import Config
from groupwise.config.loading import config_json
from groupwise.trajectories import EvalTrajectoryRow, SegmentRow, TrajectoryRow, eval_to_json, to_json

TEXT = "Ünder 12 apples — 🍎 and <b>bold</b> "


def lines(file: Path, rows: Iterable[Mapping[str, Any]], *, escaped: bool = False) -> None:
    """Append; `escaped` as a writer does that knows ASCII alone, which can write halves of characters."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as out:
        out.writelines(json.dumps(row, ensure_ascii=escaped) + "\n" for row in rows)


def rollout(step: int, group: int, index: int, *, tokens: int = 12, **given: Any) -> TrajectoryRow:
    """One whose numbers follow from its place."""
    draw = random.Random(f"{step}/{group}/{index}")
    reward = float(draw.random() < step / 100)
    text = f"answer {index} of step {step}: " + TEXT * (tokens // 8)
    made: dict[str, Any] = {
        "step": step,
        "group": group,
        "uid": f"{group % 400:06d}",
        "draw": group // 400,
        "sample_index": index,
        "data_source": "made",
        "prompt": f"<|user|>Question {group % 400}, please?<|assistant|>",
        "prompt_tokens": 9,
        "segments": (SegmentRow("model", text, tokens, finish_reason="stop"),),
        "token_ids": tuple(draw.randrange(3, 250) for _ in range(tokens)),
        "logprobs": tuple(-draw.expovariate(3) for _ in range(tokens)),
        "policy_versions": (step - 1,) * tokens,
        "rewards": {"made": reward, "format": None},
        "reward": reward,
        "advantage": reward - 0.5,
        "finish_reason": "stop",
    }
    return TrajectoryRow(**(made | given))


def evaluated(step: int, row: int) -> EvalTrajectoryRow:
    right = random.Random(row).random() < 0.2 + step / 100
    return EvalTrajectoryRow(
        uid=f"e{row:05d}",
        sample_index=0,
        data_source="made",
        prompt=f"<|user|>Held out {row}?<|assistant|>",
        text=f"step {step} says {row}",
        rewards={"made": float(right)},
        reward=float(right),
        correct=right,
        num_tokens=7,
        finish_reason="stop",
        status="ok",
        cause="",
        policy_version=step,
    )


def make_run(run: Path, *, steps: int = 6, groups: int = 4, samples: int = 4, tokens: int = 12, rows: int = 20) -> Path:
    """A finished run: metrics, findings, trajectories, evaluations before it and after it."""
    run.mkdir(parents=True)
    config = Config.model_validate({"model": {"path": "models/none"}, "optim": {"lr": 3e-5}, "train": {"steps": steps}})
    (run / "config.json").write_text(config_json(config))
    (run / "versions.json").write_text(json.dumps({"python": "3.11", "groupwise": "0.1.0", "peft": None}))
    finding = {"step": 2, "rule": "reward_flat", "seen": "the reward was 0 & <flat>", "helps": "look at it", "count": 1}
    summary = {"steps": steps, "seconds": 12.5, "seed": 0, "findings": [finding]}
    (run / "summary.json").write_text(json.dumps(summary))
    for step in range(1, steps + 1):
        add_step(run, step, groups=groups, samples=samples, tokens=tokens)
    for step in (0, steps):
        lines(run / f"trajectories/eval_{step:06d}.jsonl", (eval_to_json(evaluated(step, row)) for row in range(rows)))
    return run


def add_step(run: Path, step: int, *, groups: int = 4, samples: int = 4, tokens: int = 12) -> None:
    numbers = [(step - 1) * groups + i for i in range(groups)]
    rolled = [rollout(step, group, i, tokens=tokens) for group in numbers for i in range(samples)]
    lines(run / f"trajectories/step_{step:06d}.jsonl", map(to_json, rolled))
    mean = sum(row.reward or 0.0 for row in rolled) / len(rolled)
    lines(
        run / "metrics.jsonl", [{"step": step, "reward": mean, "loss": 0.25 / step, "grad_norm": None, "odd/one": step}]
    )
    learned = [
        {"step": step, "group": group, "uid": f"{group % 400:06d}", "samples": samples, "learned": True}
        for group in numbers
    ]
    lines(run / "ledger.jsonl", learned)
