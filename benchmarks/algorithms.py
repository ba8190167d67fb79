"""Does every algorithm learn? One warm-up for each seed, then the quick-start task with each of them.

    python benchmarks/algorithms.py --output runs/algorithms                   # all, seeds 0 1 2: about an hour
    python benchmarks/algorithms.py --output runs/algorithms --only grpo gspo --seeds 0
    python benchmarks/algorithms.py --output runs/algorithms --table           # what is finished, without running more

All rows of one seed start from the same supervised checkpoint and are measured on the same 256 held-out problems,
greedily, before and after. A row that is finished is not run again, so the program can be stopped and started.

On policy, in the first of `optim.steps_per_batch` steps, every loss has the gradient of `reinforce`. So the rows that
are about a loss take two steps per batch: in the second one ratios and clips act.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from groupwise.config import Config
from groupwise.files import write_json_atomic
from groupwise.quickstart.recipe import GRPO_STEPS, SFT_STEPS, QuickstartRecipe, prepare, quickstart_recipe

TWO_STEPS = {"optim": {"steps_per_batch": 2}}


@dataclass(frozen=True, slots=True)
class Row:
    """One run: the quick start with another algorithm.

    Attributes:
        algorithm: the whole section `[algorithm]`.
        others: settings of other sections, over those of the quick start.

    Example:
        Row("cispo", {"name": "cispo"}, TWO_STEPS)
    """

    name: str
    algorithm: Mapping[str, Any]
    others: Mapping[str, Any] = field(default_factory=dict)

    def shown(self) -> str:
        """Settings that differ from the quick start's, for people."""
        parts = [f"{key} = {_toml(value)}" for key, value in self.algorithm.items()]
        for section, values in self.others.items():
            if isinstance(values, Mapping):
                parts += [f"{section}.{key} = {_toml(value)}" for key, value in values.items()]
            else:
                parts.append(f"rewards {' and '.join(value['name'] for value in values)}")
        return "`" + "`, `".join(parts) + "`"


def _toml(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else str(value)


ADVANTAGE_ROWS = (
    Row("grpo", {"name": "grpo"}),
    Row("grpo-batch-std", {"name": "grpo", "advantage": {"scale": "batch"}}),
    Row("dr_grpo", {"name": "dr_grpo"}),
    Row("rloo", {"name": "rloo"}),
    Row("rloo-clip", {"name": "grpo", "advantage": {"name": "rloo"}}),
    Row("reinforce_pp", {"name": "reinforce_pp"}),
    Row("reinforce_pp_baseline", {"name": "reinforce_pp_baseline"}),
    Row("opo", {"name": "opo"}),
    Row("opo-clip", {"name": "grpo", "advantage": {"name": "opo"}}),
    Row("maxrl", {"name": "maxrl"}),
    Row("maxrl-clip", {"name": "grpo", "advantage": {"name": "maxrl"}}),
    Row("pass_k", {"name": "pass_k", "advantage": {"k": 4}}),
    Row("gdpo", {"name": "gdpo"}, {"reward": [{"name": "gsm8k"}, {"name": "format"}]}),
)

LOSS_ROWS = (
    Row("grpo-2-steps", {"name": "grpo"}, TWO_STEPS),
    Row("grpo-dual-clip", {"name": "grpo", "loss": {"dual_clip": 3.0}}, TWO_STEPS),
    Row("dapo", {"name": "dapo"}, TWO_STEPS),
    Row("bnpo", {"name": "bnpo"}, TWO_STEPS),
    Row("gspo", {"name": "gspo"}, TWO_STEPS),
    Row("gspo_token", {"name": "gspo_token"}, TWO_STEPS),
    Row("cispo", {"name": "cispo"}, TWO_STEPS),
    Row("sapo", {"name": "sapo"}, TWO_STEPS),
    Row("gmpo", {"name": "gmpo"}, TWO_STEPS),
    Row("reinforce", {"name": "grpo", "loss": {"name": "reinforce"}}, TWO_STEPS),
)

# Adapters start at zero and need about ten times the rate of all weights.
METHOD_ROWS = (Row("grpo-lora", {"name": "grpo"}, {"lora": {"rank": 16}, "optim": {"lr": 2e-3}}),)

ROWS: Mapping[str, Row] = {row.name: row for row in (*ADVANTAGE_ROWS, *LOSS_ROWS, *METHOD_ROWS)}


def config_of(row: Row, recipe: QuickstartRecipe, *, output: Path, steps: int) -> Config:
    """The quick start's GRPO config with the row's settings; evaluated before the first step and after the last."""
    values = recipe.grpo.model_dump(mode="json")
    values["algorithm"] = dict(row.algorithm)
    for section, given in row.others.items():
        values[section] = {**values[section], **given} if isinstance(given, Mapping) else given
    values["train"] |= {"output": str(output), "steps": steps, "trajectories": False}
    values["eval"]["every"] = steps
    values["tracking"]["backends"] = ["jsonl"]
    return Config.model_validate(values)


def warm_up(folder: Path, *, seed: int, steps: int) -> QuickstartRecipe:
    """The recipe whose supervised run is done; a run that was cut short begins again."""
    from groupwise.launch import run_sft

    recipe = quickstart_recipe(folder, seed=seed)
    if not (recipe.folders.sft / "summary.json").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        prepare(folder, seed=seed)
        run_sft(
            Config.model_validate(
                recipe.sft.model_dump() | {"train": {**recipe.sft.train.model_dump(), "steps": steps}}
            )
        )
    return recipe


def run_row(row: Row, recipe: QuickstartRecipe, *, output: Path, steps: int) -> None:
    """Train, unless it is done; keep metrics, config and summary, and not the weights."""
    from groupwise.launch import run_training

    if not (output / "summary.json").is_file():
        run_training(config_of(row, recipe, output=output, steps=steps), overwrite=True)
    for name in ("checkpoints", "final"):
        shutil.rmtree(output / name, ignore_errors=True)


def collect(root: Path, names: Sequence[str], seeds: Sequence[int]) -> dict[str, Any]:
    """What is finished: accuracy before for each seed, and each row's accuracy after, rise and mismatch."""
    before: dict[str, float] = {}
    rows: list[dict[str, Any]] = []
    for name in names:
        after: dict[str, float] = {}
        mismatch = 0.0
        for seed in seeds:
            file = root / f"seed-{seed}" / name / "summary.json"
            if not file.is_file():
                continue
            found = json.loads(file.read_text("utf-8"))["eval"]
            known = before.setdefault(str(seed), found[0]["accuracy"])
            assert known == found[0]["accuracy"], f"{file}: rows of one seed start from one model, yet differ before"
            after[str(seed)] = found[-1]["accuracy"]
            mismatch = max(mismatch, largest_mismatch(file.with_name("metrics.jsonl")))
        if after:
            rises = [after[seed] - before[seed] for seed in after]
            mean = statistics.mean(rises)
            rows.append(
                {
                    "name": name,
                    "settings": ROWS[name].shown(),
                    "after": after,
                    "mean_rise": mean,
                    "least_rise": min(rises),
                    "mismatch": mismatch,
                }
            )
    return {"versions": versions(), "before": before, "rows": rows}


def largest_mismatch(metrics: Path) -> float:
    """Between the log-probs of sampler and trainer, over all tokens of all steps."""
    rows = [json.loads(line) for line in metrics.read_text("utf-8").splitlines()]
    key = "sampling/sampling_logp_difference/max"
    return max(row[key] for row in rows if key in row)


def versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in ("torch", "transformers")}


def markdown(table: Mapping[str, Any]) -> str:
    """A Markdown table; accuracies in per cent, rises in points."""
    seeds = sorted(table["before"], key=int)
    lines = [
        "| run | `[algorithm]` and other settings | "
        + " | ".join(f"seed {seed}" for seed in seeds)
        + " | mean rise | mismatch |",
        "|---|---|" + "---|" * (len(seeds) + 2),
        "| *before* | | " + " | ".join(f"{table['before'][seed]:.1%}" for seed in seeds) + " | | |",
    ]
    for row in table["rows"]:
        cells = [f"{row['after'][seed]:.1%}" if seed in row["after"] else "" for seed in seeds]
        ends = f"{100 * row['mean_rise']:+.1f} | {row['mismatch']:g}"
        lines.append(f"| `{row['name']}` | {row['settings']} | " + " | ".join(cells) + f" | {ends} |")
    return "\n".join(lines)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="folder of the runs and of table.json")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=ROWS, metavar="NAME", help=f"of {', '.join(ROWS)}")
    parser.add_argument("--table", action="store_true", help="run nothing; print what is finished")
    parser.add_argument("--steps", type=int, default=GRPO_STEPS, help="of each row")
    parser.add_argument("--warm-up-steps", type=int, default=SFT_STEPS)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    names = args.only or list(ROWS)
    for seed in [] if args.table else args.seeds:
        folder = args.output / f"seed-{seed}"
        recipe = warm_up(folder / "warm-up", seed=seed, steps=args.warm_up_steps)
        for name in names:
            run_row(ROWS[name], recipe, output=folder / name, steps=args.steps)
            table = collect(args.output, [name], [seed])
            after = table["rows"][0]["after"][str(seed)]
            print(
                f"seed {seed}  {name:<24}{table['before'][str(seed)]:.1%} to {after:.1%}", file=sys.stderr, flush=True
            )
    table = collect(args.output, names, args.seeds)
    write_json_atomic(args.output / "table.json", table)
    print(markdown(table))


if __name__ == "__main__":
    main()
