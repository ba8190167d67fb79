"""What the doctor costs: steps of the quick start, in pairs of one with it and one without.

    python benchmarks/doctor.py --pairs 40

Which of a pair's steps has the doctor is by turns. A step lasts from one call of the doctor to the next one, so files
and lines are in it; evaluations and checkpoints are left out. Beside the difference, which noise is part of, stands the
time inside the doctor.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from groupwise.config import Config
from groupwise.doctor import Doctor
from groupwise.launch import run_sft, run_training
from groupwise.quickstart.recipe import prepare
from groupwise.types import RolloutGroup

WARM = 2  # steps that are not counted


class Timed:
    """Stands for `Doctor.after`, and calls it in every other step of a pair."""

    def __init__(self) -> None:
        self.inside: list[float] = []
        self.steps: dict[bool, list[float]] = {True: [], False: []}
        self._after = Doctor.after
        self._last: float | None = None

    def __call__(self, doctor: Doctor, step: int, numbers: Mapping[str, float], groups: Sequence[RolloutGroup]) -> None:
        pair, place = divmod(step - 1, 2)
        looks = (pair + place) % 2 == 0
        began = time.perf_counter()
        if looks:
            self._after(doctor, step, numbers, groups)
        ended = time.perf_counter()
        if step > WARM and self._last is not None:
            self.steps[looks].append(ended - self._last)
            self.inside += [ended - began] if looks else []
        self._last = ended


def main(arguments: list[str] | None = None) -> float:
    """Print what was measured; returns the share of a step's time inside the doctor."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--warm-up", type=int, default=60, help="supervised steps before")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        recipe = prepare(Path(folder) / "quickstart", seed=0)
        run_sft(_changed(recipe.sft, steps=options.warm_up))
        timed, after = Timed(), Doctor.after
        Doctor.after = lambda self, *given: timed(self, *given)  # pyright: ignore[reportAttributeAccessIssue]
        try:
            run_training(_changed(recipe.grpo, steps=WARM + 2 * options.pairs, eval_every=0))
        finally:
            Doctor.after = after
    return _report(timed)


def _changed(config: Config, *, steps: int, eval_every: int | None = None) -> Config:
    train = config.train.model_copy(update={"steps": steps, "save_every": 0, "save_every_minutes": 0.0})
    tracking = config.tracking.model_copy(update={"backends": ("jsonl",)})
    evaluation = config.eval if eval_every is None else config.eval.model_copy(update={"every": eval_every})
    return config.model_copy(update={"train": train, "tracking": tracking, "eval": evaluation})


def _report(timed: Timed) -> float:
    looked, alone = timed.steps[True], timed.steps[False]
    differences = [one - other for one, other in zip(looked, alone, strict=True)]
    usual = statistics.median(alone)
    error = statistics.stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else float("nan")
    share = statistics.median(timed.inside) / usual
    print(f"{len(differences)} pairs; a step without the doctor: median {usual * 1_000:.1f} ms")
    print(f"inside the doctor: median {statistics.median(timed.inside) * 1_000:.3f} ms, {share:.2%} of a step")
    print(
        f"difference of a pair: mean {statistics.fmean(differences) / usual:+.2%} ± {error / usual:.2%} of a step, "
        f"median {statistics.median(differences) / usual:+.2%}"
    )
    return share


if __name__ == "__main__":
    main()
