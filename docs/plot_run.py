"""Draws a run: `python docs/plot_run.py RUN_DIR OUT.svg` (or .png). Needs matplotlib."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SMOOTH = 5  # steps of the running mean
REWARD_COLOUR = "#1f6feb"
ACCURACY_COLOUR = "#d1572a"


@dataclass(frozen=True, slots=True)
class Curve:
    """A metric over training steps; steps that lack it, or where it is null, are left out.

    Example:
        Curve(steps=(1, 2), values=(0.25, 0.5))
    """

    steps: tuple[int, ...]
    values: tuple[float, ...]

    def smoothed(self, width: int = SMOOTH) -> tuple[float, ...]:
        """Means over the last `width` values, fewer at the start."""
        windows = (self.values[max(0, end - width) : end] for end in range(1, len(self.values) + 1))
        return tuple(sum(window) / len(window) for window in windows)


def read_curve(run: Path, name: str) -> Curve:
    """The metric `name` from the run's metrics.jsonl.

    Raises:
        SystemExit: the folder holds no metrics.jsonl.
    """
    file = run / "metrics.jsonl"
    if not file.is_file():
        raise SystemExit(f"error: {run} holds no metrics.jsonl; expected a run directory of `groupwise train`")
    rows: list[dict[str, Any]] = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    return Curve(tuple(step for step, _ in points), tuple(value for _, value in points))


def draw(run: Path, out: Path) -> None:
    """Write the picture: the reward of each step with its running mean, and held-out accuracy where it was measured."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "groupwise"  # so that the same run gives the same file
    from matplotlib import pyplot as plt

    reward, accuracy = read_curve(run, "reward"), read_curve(run, "eval/accuracy")
    if not reward.steps:
        raise SystemExit(f"error: {run} has no step with a reward yet")
    figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
    axes.plot(reward.steps, reward.values, color=REWARD_COLOUR, alpha=0.3, linewidth=1)
    axes.plot(
        reward.steps, reward.smoothed(), color=REWARD_COLOUR, linewidth=2, label=f"reward, mean of {SMOOTH} steps"
    )
    if accuracy.steps:
        axes.plot(accuracy.steps, accuracy.values, "o-", color=ACCURACY_COLOUR, label="held-out accuracy")
    axes.set_xlabel("training step")
    axes.set_ylim(bottom=min(0.0, *reward.values))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="best", frameon=False)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=160, metadata={"Date": None} if out.suffix == ".svg" else None)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Draw a run's reward and held-out accuracy.")
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="run directory of `groupwise train`")
    parser.add_argument("out", type=Path, metavar="OUT", help="picture to write: .svg or .png")
    args = parser.parse_args(arguments)
    draw(args.run, args.out)


if __name__ == "__main__":
    main()
