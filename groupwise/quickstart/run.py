"""`groupwise quickstart`: the tiny task, a tiny model from scratch, supervised warm-up, GRPO, before and after."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

from groupwise.errors import ConfigError
from groupwise.files import write_json_atomic
from groupwise.quickstart.recipe import QuickstartRecipe, prepare

_PARTS = frozenset({"data", "model", "sft", "grpo", "summary.json"})


def run_quickstart(output: str | Path, seed: int = 0, *, overwrite: bool = False) -> dict[str, Any]:
    """Run everything below `output` and print a table; returns what `summary.json` holds.

    `accuracy_before` and `accuracy_after` are greedy, on 256 held-out problems, after the warm-up and after GRPO.

    Raises:
        ConfigError: `output` holds something, and `overwrite` is not given or it is not an earlier quickstart.
    """
    from groupwise.launch import run_sft, run_training

    started = time.perf_counter()
    root = Path(output)
    _make_way(root, overwrite=overwrite)
    recipe = prepare(root, seed=seed)
    warm_up = run_sft(recipe.sft)
    training = run_training(recipe.grpo)
    summary = {
        "accuracy_before": training["eval"][0]["accuracy"],
        "accuracy_after": training["eval"][-1]["accuracy"],
        "seconds": round(time.perf_counter() - started, 1),
        "seconds_warm_up": warm_up["seconds"],
        "seconds_grpo": training["seconds"],
        "seed": seed,
        "run": str(recipe.folders.grpo),
        "model": str(recipe.folders.grpo / "final"),
    }
    write_json_atomic(root / "summary.json", summary)
    _show(recipe, summary, training)
    return summary


def _make_way(root: Path, *, overwrite: bool) -> None:
    entries = {entry.name for entry in root.iterdir()} if root.is_dir() else set[str]()
    if not entries:
        return
    foreign = sorted(entries - _PARTS)
    if foreign:
        raise ConfigError(f"{root} holds {', '.join(foreign[:5])}, which no quickstart wrote; choose another --output")
    if not overwrite:
        raise ConfigError(f"{root} holds an earlier quickstart; use --overwrite to replace it, or another --output")
    for name in entries:
        path = root / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _show(recipe: QuickstartRecipe, summary: dict[str, Any], training: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from groupwise.launch.ending import findings_lines, next_lines

    table = Table(title="Held-out accuracy, greedy, 95 % interval")
    for column in ("after", "accuracy", "interval", "tokens"):
        table.add_column(column, justify="left" if column == "after" else "right")
    for evaluation in training["eval"]:
        step = evaluation["step"]
        table.add_row(
            f"{step} GRPO steps" if step else "warm-up",
            f"{evaluation['accuracy']:.1%}",
            f"{evaluation['ci_low']:.1%} to {evaluation['ci_high']:.1%}",
            f"{evaluation['mean_length']:.1f}",
        )
    console = Console()
    console.print(table)
    gain = 100 * (summary["accuracy_after"] - summary["accuracy_before"])
    console.print(f"{gain:+.1f} points in {summary['seconds']:.0f} s, seed {summary['seed']}")
    run = recipe.folders.grpo
    places = (f"run directory: {run}", f"model: {run / 'final'}")
    for line in (*findings_lines(training["findings"]), *places, *next_lines(str(run))):
        console.print(line, soft_wrap=True)
