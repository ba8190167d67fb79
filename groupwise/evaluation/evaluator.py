"""Runs the evaluation: every row exactly once, scored while other rows are still being generated."""

from __future__ import annotations

import asyncio
import logging
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from groupwise.config import EvalConfig
from groupwise.empty_steps import commonest
from groupwise.environments import SINGLE_TURN, Environments
from groupwise.errors import DataError
from groupwise.evaluation.best import Best
from groupwise.evaluation.report import EvalReport, EvalRow, EvalSample, build_report
from groupwise.inputs import SampleKey
from groupwise.metrics import Metrics
from groupwise.rollout.episode import Sample, Scorer, run_group
from groupwise.types import Prompt, Rollout, RolloutGroup, SamplingParams

logger = logging.getLogger(__name__)


async def evaluate(
    sample: Sample,
    prompts: Sequence[Prompt],
    scorer: Scorer,
    environments: Environments = SINGLE_TURN,
    *,
    config: EvalConfig,
    sampling: SamplingParams,
    version: int,
) -> EvalReport:
    """Run `config.samples` episodes of each of the first `config.limit` prompts and score them.

    An answer is correct when its first reward (the raw value of the first function that applies) is above
    `config.threshold`. One that the engine, an environment or a reward failed on, or that has no reward, is wrong and
    is counted, and a warning tells of it. Where every one failed nothing was measured, and there is no accuracy.
    With the same weights, prompts and `sampling.seed`, a seeded engine gives the same report.

    Raises:
        DataError: there are no prompts.
        EngineError: the engine as a whole failed.
    """
    chosen = _chosen(prompts, config)
    # All at once, so that the engine decides what is batched with what.
    groups = [
        asyncio.ensure_future(
            run_group(
                sample,
                scorer,
                environments,
                prompt,
                keys=[SampleKey(prompt.uid, 0, index) for index in range(config.samples)],
                sampling=sampling,
                version=version,
            )
        )
        for prompt in chosen
    ]
    try:
        rows = [_judged(group, threshold=config.threshold) for group in await asyncio.gather(*groups)]
    finally:
        for group in groups:
            group.cancel()
    report = build_report(rows, version=version)
    if report.causes:
        logger.warning(
            "evaluation of version %d: %d of %d samples failed, %s: %s",
            version,
            len(report.causes),
            len(chosen) * config.samples,
            "so there is no accuracy" if report.nothing_measured else "and count as wrong",
            commonest(report.causes),
        )
    return report


def _judged(group: RolloutGroup, *, threshold: float) -> EvalRow:
    return EvalRow(group.prompt, tuple(_sample(rollout, threshold=threshold) for rollout in group.rollouts))


def _sample(rollout: Rollout, *, threshold: float) -> EvalSample:
    name, first = next(((n, value) for n, value in rollout.rewards.items() if value is not None), ("", None))
    valid = first is not None and rollout.reward is not None and math.isfinite(first) and math.isfinite(rollout.reward)
    failed = rollout.status == "failed" or bool(rollout.cause) or not valid
    return EvalSample(
        sample_index=rollout.sample_index,
        text=rollout.text,
        num_tokens=rollout.num_written,
        finish_reason=rollout.finish_reason,
        rewards=rollout.rewards,
        reward=rollout.reward,
        correct=not failed and first is not None and first > threshold,
        counted="" if failed else name,
        failed=failed,
        cause=(rollout.cause or "no reward function gave a finite value") if failed else "",
    )


def _chosen(prompts: Sequence[Prompt], config: EvalConfig) -> Sequence[Prompt]:
    chosen = prompts[: config.limit]
    if not chosen:
        raise DataError(
            "the evaluation data has no rows to use; expected at least one prompt within data.max_prompt_tokens: "
            "check data.eval, or raise the limit"
        )
    repeated = [uid for uid, count in Counter(prompt.uid for prompt in chosen).items() if count > 1]
    assert not repeated, f"prompts share a uid, so one would be sampled for the other: {repeated[:3]}"
    return chosen


class Evaluation(Protocol):
    """What the loop asks for scores."""

    best: Best

    async def maybe_run(self, step: int, *, final: bool = False, asked: bool = False) -> Metrics:
        """The metrics of the policy after `step` training steps, or nothing when none are due or asked for."""
        ...


class NoEvaluation:
    """Of a run that has nothing to be evaluated on; an `Evaluation`."""

    def __init__(self) -> None:
        self.best = Best(None)

    async def maybe_run(self, step: int, *, final: bool = False, asked: bool = False) -> Metrics:
        """Nothing."""
        return {}


class Evaluator:
    """Evaluation inside a training loop, with the cadence inside.

    It runs after every `config.every` steps, before the first one when `config.at_start`, and after the last; when
    `config.every` is 0 only where it is asked for. Never twice for one step, also over a resume.

    Args:
        on_report: called with the step and the report after each evaluation, to write trajectories, say.
        keep_best: the metric whose best evaluation `best` knows.

    Raises:
        DataError: evaluation is due at some time and there are no prompts.
    """

    def __init__(
        self,
        sample: Sample,
        prompts: Sequence[Prompt],
        *,
        scorer: Scorer,
        environments: Environments = SINGLE_TURN,
        config: EvalConfig,
        sampling: SamplingParams,
        on_report: Callable[[int, EvalReport], None] | None = None,
        keep_best: str | None = None,
    ) -> None:
        self.best = Best(keep_best)
        self._sample = sample
        self._prompts = _chosen(prompts, config) if config.every else prompts
        self._scorer = scorer
        self._environments = environments
        self._config = config
        self._sampling = sampling
        self._on_report = on_report
        self._last_step = -1

    async def maybe_run(self, step: int, *, final: bool = False, asked: bool = False) -> Metrics:
        """The metrics of the policy after `step` training steps, or nothing when no evaluation is due or asked for."""
        if not self._is_due(step, final=final) and not (asked and step != self._last_step):
            return {}
        report = await evaluate(
            self._sample,
            self._prompts,
            self._scorer,
            self._environments,
            config=self._config,
            sampling=self._sampling,
            version=step,
        )
        self._last_step = step
        if self._on_report is not None:
            self._on_report(step, report)
        found = report.metrics()
        self.best.judge(step, found)
        return found

    def _is_due(self, step: int, *, final: bool) -> bool:
        every = self._config.every
        if every == 0 or step == self._last_step:
            return False
        if step == 0:
            return self._config.at_start
        return final or step % every == 0

    def state_dict(self) -> dict[str, Any]:
        return {"last_step": self._last_step, "best": self.best.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._last_step = int(state["last_step"])
        self.best.load_state_dict(state.get("best", {}))
