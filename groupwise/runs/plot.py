"""Metrics of one run or several, drawn: one panel for each, runs laid over each other."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from groupwise.errors import ConfigError, nearest
from groupwise.files import write_bytes_atomic, writing
from groupwise.runs.reading import finite, json_rows

PANELS: tuple[tuple[str, ...], ...] = (
    ("reward", "eval/accuracy"),
    ("completions/mean_length",),
    ("entropy", "kl"),
    ("sampling/sampling_logp_difference/mean",),
)
"""What is drawn unless somebody names metrics; of these, what the runs have."""

SUFFIXES = (".svg", ".png", ".pdf")
_WIDTH, _HEIGHT = 8.0, 3.0


@dataclass(frozen=True, slots=True)
class Curve:
    """A metric over training steps; steps that lack it, or where it is null, are left out.

    Example:
        Curve(steps=(1, 2), values=(0.25, 0.5))
    """

    steps: tuple[int, ...]
    values: tuple[float, ...]

    def smoothed(self, width: int) -> tuple[float, ...]:
        """Means over the last `width` values, fewer at the start."""
        windows = (self.values[max(0, end - width) : end] for end in range(1, len(self.values) + 1))
        return tuple(sum(window) / len(window) for window in windows)


@dataclass(frozen=True, slots=True)
class Metrics:
    """The rows of one run's metrics.jsonl."""

    run: Path
    rows: tuple[dict[str, Any], ...]

    def curve(self, name: str) -> Curve:
        """Of one metric; an empty one where the run has none."""
        points = [(row["step"], value) for row in self.rows if (value := finite(row.get(name))) is not None]
        return Curve(tuple(step for step, _ in points), tuple(value for _, value in points))

    @property
    def names(self) -> set[str]:
        return {name for row in self.rows for name in row} - {"step"}


def read_metrics(run: Path) -> Metrics:
    """What a run has logged so far; a line that is being written is not one yet.

    Raises:
        ConfigError: the folder holds no metrics.
    """
    file = run / "metrics.jsonl"
    try:
        file.open("rb").close()
    except OSError as error:
        raise ConfigError(
            f"{run} holds no metrics.jsonl that can be read ({error.strerror}); expected a run directory"
        ) from error
    rows = [row for row in json_rows(file)[0] if finite(row.get("step")) is not None]
    if not rows:
        raise ConfigError(f"{run} has no step yet; draw it when it has")
    return Metrics(run, tuple(rows))


def chosen_panels(runs: Sequence[Metrics], names: Sequence[str]) -> list[tuple[str, ...]]:
    """One panel for each metric that is named; without names, those of `PANELS` that the runs have.

    Raises:
        ConfigError: no run has a metric of that name.
    """
    known = set[str]().union(*(run.names for run in runs))
    for name in names:
        if name not in known:
            hint = nearest(name, known, "; did you mean {!r}?")
            raise ConfigError(f"--metrics {name}: no run has such a metric{hint}")
    panels = [(name,) for name in names] or [tuple(name for name in panel if name in known) for panel in PANELS]
    return [panel for panel in panels if panel]


def draw(runs: Sequence[Metrics], panels: Sequence[Sequence[str]], out: Path, *, smooth: int) -> None:
    """Write the picture; the same runs give the same file.

    Args:
        smooth: steps of the running mean; the values themselves are drawn pale.

    Raises:
        ConfigError: matplotlib is missing, or the picture is of a kind that it is not for.
        FileError: it cannot be written; what was there before is untouched.
    """
    if out.suffix not in SUFFIXES:
        raise ConfigError(f"--output {out}: expected a name that ends in {', '.join(SUFFIXES)}")
    if find_spec("matplotlib") is None:
        raise ConfigError("groupwise plot needs matplotlib: pip install 'groupwise[plot]'")
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "groupwise"
    from matplotlib import pyplot as plt

    size = (_WIDTH, _HEIGHT * len(panels))
    figure, rows = plt.subplots(len(panels), figsize=size, layout="constrained", squeeze=False)
    colours = plt.get_cmap("tab10").colors  # type: ignore[attr-defined]
    for axes, panel in zip(rows[:, 0], panels, strict=True):
        for number, name in enumerate(panel):
            for index, run in enumerate(runs):
                colour = colours[(index * len(panel) + number) % len(colours)]
                label = name if len(runs) == 1 else f"{run.run.name}: {name}"
                _line(axes, run.curve(name), colour, label=label, smooth=smooth)
        axes.set_xlabel("training step")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.lines:
            axes.legend(loc="best", frameon=False, fontsize="small")
    picture = io.BytesIO()
    figure.savefig(picture, format=out.suffix[1:], dpi=160, metadata={"Date": None} if out.suffix == ".svg" else None)
    plt.close(figure)
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    write_bytes_atomic(out, picture.getvalue())


def _line(axes: Any, curve: Curve, colour: Any, *, label: str, smooth: int) -> None:
    if not curve.steps:
        return
    if len(curve.steps) < 2 * smooth or "eval/" in label:  # few points are points
        axes.plot(curve.steps, curve.values, "o-", color=colour, markersize=4, label=label)
        return
    axes.plot(curve.steps, curve.values, color=colour, alpha=0.3, linewidth=1)
    mean = f"{label}, mean of {smooth} steps" if smooth > 1 else label
    axes.plot(curve.steps, curve.smoothed(smooth), color=colour, linewidth=2, label=mean)
