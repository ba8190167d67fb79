"""What an evaluation found: the numbers, and every sample behind them."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from groupwise.accuracy import accuracy, confidence_interval, mean_pass_at_k
from groupwise.metrics import Last, Metric
from groupwise.trajectories import EvalTrajectoryRow
from groupwise.types import FinishReason, Prompt


@dataclass(frozen=True, slots=True)
class EvalSample:
    """One completion and its judgement. A failed one is never correct, whatever its rewards say.

    Attributes:
        num_tokens: T, the stop token included.
        rewards: each reward function's raw value by name; None where it does not apply.
        reward: the weighted sum, None when no function gave a value.
        counted: the name of the reward that decided `correct`; "" where none did.

    Example:
        EvalSample(sample_index=0, text="#### 4", num_tokens=5, finish_reason="stop", rewards={"gsm8k": 1.0},
                   reward=1.0, correct=True, counted="gsm8k")
    """

    sample_index: int
    text: str
    num_tokens: int
    finish_reason: FinishReason
    rewards: Mapping[str, float | None] = field(default_factory=dict)
    reward: float | None = None
    correct: bool = False
    counted: str = ""
    failed: bool = False
    cause: str = ""


@dataclass(frozen=True, slots=True)
class EvalRow:
    """A row of the data and its samples, ordered by `sample_index`."""

    prompt: Prompt
    samples: tuple[EvalSample, ...]

    @property
    def failed(self) -> bool:
        return any(sample.failed for sample in self.samples)


@dataclass(frozen=True, slots=True)
class EvalReport:
    """Scores of one policy version.

    Attributes:
        accuracy: mean over rows of the mean over samples; failed samples count as wrong. NaN where every sample failed:
            then nothing was measured.
        accuracy_of: names of the rewards that decided what is correct, the most frequent first.
        ci_low, ci_high: 95 % confidence interval of `accuracy`.
        pass_at_k: k = 1, 2, 4, … up to the samples per row; empty where every sample failed.
        num_failed: rows of which at least one sample failed.
        mean_reward: mean weighted reward of the samples that have one; None when none has.
        mean_length: tokens per completion, over samples that did not fail in the engine.
        clipped_ratio: share of those that ended at the token limit.
        rows: in the order of the data.
    """

    version: int
    accuracy: float
    accuracy_of: tuple[str, ...]
    ci_low: float
    ci_high: float
    pass_at_k: Mapping[int, float]
    num_rows: int
    num_failed: int
    mean_reward: float | None
    mean_length: float
    clipped_ratio: float
    rows: tuple[EvalRow, ...]

    @property
    def causes(self) -> list[str]:
        """Why samples failed, one text for each that did."""
        return [sample.cause for row in self.rows for sample in row.samples if sample.failed]

    @property
    def nothing_measured(self) -> bool:
        """Whether every sample failed."""
        return math.isnan(self.accuracy)

    def values_of_rewards(self) -> dict[str, list[float]]:
        """Each reward function's values, over the samples that it applies to."""
        values: dict[str, list[float]] = {}
        for row in self.rows:
            for sample in row.samples:
                for name, value in sample.rewards.items():
                    if value is not None:
                        values.setdefault(name, []).append(value)
        return values

    def metrics(self) -> dict[str, Metric]:
        """`eval/…` readings. `eval/pass@k` starts at 2, since pass@1 is the accuracy."""
        readings: dict[str, Metric] = {} if self.nothing_measured else {"eval/accuracy": Last(self.accuracy)}
        readings |= {f"eval/pass@{k}": Last(value) for k, value in self.pass_at_k.items() if k > 1}
        if self.mean_reward is not None:
            readings["eval/reward"] = Last(self.mean_reward)
        readings |= self._spreads()
        for name, values in self.values_of_rewards().items():
            readings[f"eval/rewards/{name}/mean"] = Last(math.fsum(values) / len(values))
            if len(values) > 1:
                readings[f"eval/rewards/{name}/std"] = Last(statistics.stdev(values))
        lengths = [s.num_tokens for row in self.rows for s in row.samples if s.finish_reason in ("stop", "length")]
        readings["eval/mean_length"] = Last(self.mean_length)
        readings["eval/min_length"] = Last(float(min(lengths, default=0)))
        readings["eval/max_length"] = Last(float(max(lengths, default=0)))
        readings["eval/clipped_ratio"] = Last(self.clipped_ratio)
        readings["eval/failed"] = Last(float(self.num_failed))
        return readings

    def _spreads(self) -> dict[str, Metric]:
        """How far the samples of one row differ, as in training: means over rows of two samples or more."""
        rewards = [[sample.reward for sample in row.samples if sample.reward is not None] for row in self.rows]
        compared = [found for found in rewards if len(found) > 1]
        if not compared:
            return {}
        equal = sum(max(found) == min(found) for found in compared)
        return {
            "eval/reward_std": Last(math.fsum(map(statistics.stdev, compared)) / len(compared)),
            "eval/frac_reward_zero_std": Last(equal / len(compared)),
        }

    def summary(self) -> dict[str, Any]:
        """The numbers as JSON values, without the samples."""
        return {
            "version": self.version,
            "accuracy": None if self.nothing_measured else self.accuracy,
            "accuracy_of": list(self.accuracy_of),
            "ci_low": None if self.nothing_measured else self.ci_low,
            "ci_high": None if self.nothing_measured else self.ci_high,
            "pass_at_k": {str(k): value for k, value in self.pass_at_k.items()},
            "num_rows": self.num_rows,
            "num_failed": self.num_failed,
            "mean_reward": self.mean_reward,
            "mean_length": self.mean_length,
            "clipped_ratio": self.clipped_ratio,
        }

    def records(self) -> Iterator[EvalTrajectoryRow]:
        """One row per sample, for a trajectory file."""
        for row in self.rows:
            for sample in row.samples:
                yield EvalTrajectoryRow(
                    uid=row.prompt.uid,
                    sample_index=sample.sample_index,
                    data_source=row.prompt.data_source,
                    prompt=row.prompt.text,
                    text=sample.text,
                    rewards=sample.rewards,
                    reward=sample.reward,
                    correct=sample.correct,
                    num_tokens=sample.num_tokens,
                    finish_reason=sample.finish_reason,
                    status="failed" if sample.failed else "ok",
                    cause=sample.cause,
                    policy_version=self.version,
                )


def build_report(rows: Sequence[EvalRow], *, version: int) -> EvalReport:
    """The numbers of these rows.

    Raises:
        ValueError: no rows, or a row without samples.
    """
    outcomes = [[sample.correct for sample in row.samples] for row in rows]
    samples = [sample for row in rows for sample in row.samples]
    measured = not all(sample.failed for sample in samples)
    score = accuracy(outcomes)
    interval = confidence_interval(outcomes)
    depths = _powers_of_two(min(map(len, outcomes))) if measured else []
    counted = Counter(sample.counted for sample in samples if sample.counted)
    rewards = [sample.reward for sample in samples if sample.reward is not None and not sample.failed]
    generated = [sample for sample in samples if sample.finish_reason in ("stop", "length")]
    return EvalReport(
        version=version,
        accuracy=score if measured else math.nan,
        accuracy_of=tuple(name for name, _ in counted.most_common()),
        ci_low=interval.low if measured else math.nan,
        ci_high=interval.high if measured else math.nan,
        pass_at_k={k: mean_pass_at_k(outcomes, k) for k in depths},
        num_rows=len(rows),
        num_failed=sum(row.failed for row in rows),
        mean_reward=sum(rewards) / len(rewards) if rewards else None,
        mean_length=sum(sample.num_tokens for sample in generated) / max(len(generated), 1),
        clipped_ratio=sum(sample.finish_reason == "length" for sample in generated) / max(len(generated), 1),
        rows=tuple(rows),
    )


def _powers_of_two(limit: int) -> list[int]:
    return [2**exponent for exponent in range(limit.bit_length())]
