"""What watching costs: runs of the quick start with the doctor and the rows of `trajectories/`, and without both.

    python benchmarks/doctor.py --rounds 5

The runs of a round have the same bits, so a step with and the same step without are a pair that differs in nothing
else. Of each step the fastest of all rounds counts, in seconds of the processor: other work on the machine is noise
that only makes steps longer. A step lasts from one call of the doctor to the next one, so files and lines are in it;
evaluations and checkpoints are left out. Beside the difference stands the time inside the doctor and inside the rows.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

import groupwise.train
from groupwise.config import Config
from groupwise.doctor import Doctor
from groupwise.launch import run_sft, run_training
from groupwise.quickstart.recipe import prepare
from groupwise.types import RolloutGroup

WARM = 2  # steps that are not counted


@dataclass(slots=True)
class Side:
    """One run: seconds of its steps, and those inside what is measured."""

    watches: bool
    steps: list[float] = field(default_factory=list[float])
    doctor: list[float] = field(default_factory=list[float])
    rows: list[float] = field(default_factory=list[float])
    _last: float | None = None

    def after(
        self, real: Callable[..., None]
    ) -> Callable[[Doctor, int, Mapping[str, float], Sequence[RolloutGroup]], None]:
        """Stands for `Doctor.after`."""

        def timed(doctor: Doctor, step: int, numbers: Mapping[str, float], groups: Sequence[RolloutGroup]) -> None:
            began = time.process_time()
            if self.watches:
                real(doctor, step, numbers, groups)
            ended = time.process_time()
            if step > WARM and self._last is not None:
                self.steps.append(ended - self._last)
                self.doctor.append(ended - began)
            self._last = ended

        return timed

    def append(self, real: Callable[..., None]) -> Callable[..., None]:
        """Stands for the loop's `append_rows`."""

        def timed(path: Path, *given: object) -> None:
            began = time.process_time()
            real(path, *given)
            if path.parent.name == "trajectories":
                self.rows.append(time.process_time() - began)

        return timed


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Print what was measured; returns the shares of a step inside the doctor and inside the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20, help="of each run")
    parser.add_argument("--warm-up", type=int, default=60, help="supervised steps before")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        recipe = prepare(Path(folder) / "quickstart", seed=0)
        run_sft(_changed(recipe.sft, output=recipe.sft.train.output, steps=options.warm_up))
        sides = list[Side]()
        for number in range(options.rounds):
            order = (True, False) if number % 2 == 0 else (False, True)
            for watches in order:
                output = str(Path(folder) / f"run{len(sides)}")
                side = Side(watches)
                _run(_changed(recipe.grpo, output=output, steps=WARM + options.steps, rows=watches), side)
                sides.append(side)
    return _report(sides)


def _run(config: Config, side: Side) -> None:
    after, append = Doctor.after, groupwise.train.append_rows
    Doctor.after = side.after(after)  # pyright: ignore[reportAttributeAccessIssue]
    groupwise.train.append_rows = side.append(append)
    try:
        run_training(config)
    finally:
        Doctor.after, groupwise.train.append_rows = after, append


def _changed(config: Config, *, output: str, steps: int, rows: bool = True) -> Config:
    train = config.train.model_copy(
        update={"steps": steps, "output": output, "save_every": 0, "save_every_minutes": 0.0, "trajectories": rows}
    )
    tracking = config.tracking.model_copy(update={"backends": ("jsonl",)})
    evaluation = config.eval.model_copy(update={"every": 0, "at_start": False})
    return config.model_copy(update={"train": train, "tracking": tracking, "eval": evaluation})


def _report(sides: Sequence[Side]) -> dict[str, float]:
    watched = [min(same) for same in zip(*(side.steps for side in sides if side.watches), strict=True)]
    alone = [min(same) for same in zip(*(side.steps for side in sides if not side.watches), strict=True)]
    usual = statistics.fmean(alone)
    differences = [(one - other) / usual for one, other in zip(watched, alone, strict=True)]
    share, error = statistics.fmean(differences), statistics.stdev(differences) / len(differences) ** 0.5
    doctor = statistics.median(second for side in sides if side.watches for second in side.doctor)
    rows = statistics.median(second for side in sides if side.watches for second in side.rows)
    print(f"{len(differences)} pairs of steps, the fastest of {len(sides) // 2} each; without: {usual * 1_000:.1f} ms")
    for name, inside in (("the doctor", doctor), ("rows", rows)):
        print(f"inside {name}: {inside * 1_000:.2f} ms, {inside / usual:.2%} of a step")
    print(f"with both: {share:+.2%} ± {error:.2%} of a step")
    return {"doctor": doctor / usual, "rows": rows / usual}


if __name__ == "__main__":
    main()
