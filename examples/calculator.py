"""A tiny model learns to call a calculator: on a CPU, without a download, in two minutes.

Its warm-up shows worked sums. Three in ten call the calculator, `14+9=<<14+9>>`, after which the result stands there;
the others reckon by head, and more than half of these are wrong. So the model starts out calling now and then, and
often wrong. GRPO rewards the right answer alone, and does not know of calls: they come because they pay.

    python examples/calculator.py --output runs/calculator
"""

from __future__ import annotations

import argparse
import json
import random
import re
import time
from pathlib import Path
from typing import Any

from groupwise.config import Config
from groupwise.launch import run_sft, run_training
from groupwise.quickstart.task import TaskFiles, make_task
from groupwise.quickstart.tiny_model import build_tiny_model, strings_in

CALLS_SHARE = 0.3
"""Of the demonstrations, those that call."""

WRONG_SHARE = 0.6
"""Of the others, those with a wrong sum."""

STEP = re.compile(r"^(\d+[+-]\d+)=(\d+)$")


def demonstrate(solution: str, rng: random.Random) -> str:
    """The solution with calls, or by head, perhaps wrong."""
    lines = solution.split("\n")
    if rng.random() < CALLS_SHARE:
        return "\n".join(STEP.sub(r"\1=<<\1>>\2", line) for line in lines)
    if rng.random() < WRONG_SHARE:
        expression, result = lines[1].split("=")
        wrong = str(max(0, int(result) + rng.choice([-3, -2, -1, 1, 2, 3])))
        return "\n".join((lines[0], f"{expression}={wrong}", f"#### {wrong}"))
    return solution


def make_data(folder: Path, *, seed: int, num_sft: int, num_train: int) -> TaskFiles:
    """The quick start's problems, with demonstrations of this example's own."""
    task = make_task(folder, seed=seed, num_sft=num_sft, num_train=num_train)
    rng, rows = random.Random(seed), []
    for line in task.sft.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        row["extra_info"]["answer"] = demonstrate(right_solution(row), rng)
        rows.append(json.dumps(row, ensure_ascii=False))
    task.sft.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return task


def right_solution(row: dict[str, Any]) -> str:
    """The demonstration, with the last step's sign that the answer asks for."""
    first, second, _ = row["extra_info"]["answer"].split("\n")
    half, other = re.split(r"[+-]", second.split("=")[0])
    answer = int(row["reward_model"]["ground_truth"])
    sign = "+" if int(half) + int(other) == answer else "-"
    return f"{first}\n{half}{sign}{other}={answer}\n#### {answer}"


def configs(folder: Path, task: TaskFiles, *, seed: int, sft_steps: int, steps: int) -> tuple[Config, Config]:
    """The warm-up, and the run with the calculator."""
    model = {"dtype": "float32", "device": "cpu"}
    sft = {
        "model": {"path": str(folder / "model"), **model},
        "data": {"train": str(task.sft), "max_prompt_tokens": 128},
        "sft": {"rows_per_step": 32, "max_tokens": 160},
        "optim": {"lr": 3e-3, "betas": (0.9, 0.98), "schedule": "cosine", "warmup_ratio": 0.07, "min_lr_ratio": 0.1},
        "train": {"output": str(folder / "sft"), "steps": sft_steps, "seed": seed},
    }
    grpo = {
        "model": {"path": str(folder / "sft" / "final"), **model},
        "data": {"train": str(task.train), "eval": str(task.test), "max_prompt_tokens": 128},
        "reward": [{"name": "gsm8k"}],
        "rollout": {"group_size": 8, "prompts_per_step": 32, "max_completion_tokens": 56},
        "environment": {"name": "calculator", "max_turns": 4},
        "optim": {"lr": 3e-4, "betas": (0.9, 0.98), "warmup_ratio": 0.08},
        "train": {"output": str(folder / "grpo"), "steps": steps, "seed": seed},
        "eval": {"every": max(1, steps // 2)},
    }
    return Config.model_validate(sft), Config.model_validate(grpo)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/calculator"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sft-steps", type=int, default=300)
    parser.add_argument("--steps", type=int, default=40)
    args = parser.parse_args()
    started = time.perf_counter()
    task = make_data(args.output / "data", seed=args.seed, num_sft=4000, num_train=32 * args.steps)
    rows = [json.loads(line) for line in task.sft.read_text(encoding="utf-8").splitlines()]
    texts = [text for row in rows for text in strings_in([row["prompt"], row["extra_info"]["answer"]])]
    texts += ["system", "user", "assistant"] * len(rows)
    build_tiny_model(args.output / "model", texts=texts, size="0.6m", vocab_size=400, seed=args.seed)
    sft, grpo = configs(args.output, task, seed=args.seed, sft_steps=args.sft_steps, steps=args.steps)
    run_sft(sft)
    summary = run_training(grpo)
    metrics = [json.loads(line) for line in (args.output / "grpo" / "metrics.jsonl").read_text().splitlines()]
    calls = [row.get("environment/answers_per_episode", 0.0) for row in metrics if "reward" in row]
    rewards = [row["reward"] for row in metrics if "reward" in row]
    before, after = summary["eval"][0]["accuracy"], summary["eval"][-1]["accuracy"]
    print(f"calls per episode  {calls[0]:.2f} -> {calls[-1]:.2f}")
    print(f"reward             {rewards[0]:.2f} -> {rewards[-1]:.2f}")
    print(f"accuracy           {before:.1%} -> {after:.1%}, greedy, on 256 held-out problems")
    print(
        f"{time.perf_counter() - started:.0f} s, seed {args.seed}; every episode is in {args.output}/grpo/trajectories"
    )


if __name__ == "__main__":
    main()
