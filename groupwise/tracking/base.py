"""What a tracker is. A new one is one file and one line in `registry`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from groupwise.texts import one_line, printable

LONGEST_TEXT = 20_000


@dataclass(frozen=True, slots=True)
class Sample:
    """One sampled completion, as a table shows it.

    Attributes:
        reward: the weighted sum; None where no reward function gave a value.
        rewards: each reward function's raw value by name.

    Example:
        Sample(prompt="2+2?", completion="4", reward=1.0, rewards={"gsm8k": 1.0}, advantage=0.7)
    """

    prompt: str
    completion: str
    reward: float | None
    rewards: Mapping[str, float | None]
    advantage: float


@dataclass(frozen=True, slots=True)
class SampleTable:
    """Samples of one step as columns and rows; the rewards of several functions stand in columns of their own.

    It is made for people: texts have nothing in them that acts on a terminal or that no UTF-8 takes, and are cut at
    `LONGEST_TEXT` characters.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str | float | None, ...], ...]

    @classmethod
    def of(cls, step: int, samples: Sequence[Sample]) -> SampleTable:
        names = tuple(dict.fromkeys(name for sample in samples for name in sample.rewards))
        rows = tuple(
            (
                step,
                printable(s.prompt, limit=LONGEST_TEXT),
                printable(s.completion, limit=LONGEST_TEXT),
                s.reward,
                *(s.rewards.get(name) for name in names),
                s.advantage,
            )
            for s in samples
        )
        shown = (f"rewards/{one_line(name)}" for name in names)
        columns = ("step", "prompt", "completion", "reward", *shown, "advantage")
        return cls(columns, rows)


class Tracker(Protocol):
    """Receives a run's numbers. Whatever it raises drops it from the run and nothing else, see `Trackers`.

    Example:
        class PrintTracker:
            def start(self, config, run_dir): print("start", run_dir)
            def log(self, step, metrics): print(step, metrics["reward"])
            def samples(self, step, samples): print(samples[0].completion)
            def close(self): pass
    """

    def start(self, config: Mapping[str, Any], run_dir: Path) -> None:
        """Called once before the first `log`; `config` is the resolved config as plain values."""
        ...

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One step's numbers, in a fixed order; steps rise from call to call, and a value may be NaN."""
        ...

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Some of the completions that step trained on; called before that step's `log`."""
        ...

    def close(self) -> None:
        """Called once at the end, also after an error."""
        ...
