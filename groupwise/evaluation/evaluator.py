"""Runs the evaluation: every row exactly once, scored while other rows are still being generated."""

from __future__ import annotations

import asyncio
import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from groupwise.config import EvalConfig, RolloutConfig
from groupwise.empty_steps import commonest
from groupwise.errors import DataError, EngineError
from groupwise.evaluation.best import Best
from groupwise.evaluation.report import EvalReport, EvalRow, EvalSample, build_report
from groupwise.metrics import Metrics
from groupwise.types import Completion, Engine, Prompt, SampleRequest, SamplingParams

logger = logging.getLogger(__name__)


class Score(Protocol):
    """What a scorer says of one completion; `groupwise.rewards` has the real one."""

    @property
    def reward(self) -> float | None: ...

    @property
    def rewards(self) -> Mapping[str, float | None]: ...

    @property
    def failed(self) -> bool: ...

    @property
    def cause(self) -> str: ...


class Scorer(Protocol):
    async def score(self, prompt: Prompt, completions: Sequence[Completion]) -> Sequence[Score]: ...


def eval_sampling(config: EvalConfig, rollout: RolloutConfig, *, seed: int) -> SamplingParams:
    """How evaluation draws: `eval`'s own temperature and top-p; what ends a completion is as in training.

    `top_k` and `min_p` are shapes of the training distribution and do not apply here.
    """
    max_tokens = config.max_completion_tokens or rollout.max_completion_tokens
    return SamplingParams(
        temperature=config.temperature,
        top_p=config.top_p,
        repetition_penalty=rollout.repetition_penalty,
        max_tokens=max_tokens,
        min_tokens=min(rollout.min_completion_tokens, max_tokens),
        stop=rollout.stop,
        stop_token_ids=rollout.stop_token_ids,
        seed=seed,
    )


async def evaluate(
    engine: Engine,
    prompts: Sequence[Prompt],
    scorer: Scorer,
    *,
    config: EvalConfig,
    sampling: SamplingParams,
    version: int,
) -> EvalReport:
    """Draw `config.samples` completions of each of the first `config.limit` prompts and score them.

    A completion is correct when its first reward (the raw value of the first function that applies) is above
    `config.threshold`. One that the engine or a reward failed on, or that has no reward, is wrong and is counted, and a
    warning tells of it. Where every one failed nothing was measured, and there is no accuracy.
    With the same weights, prompts and `sampling.seed`, a seeded engine gives the same report.

    Raises:
        DataError: there are no prompts.
        EngineError: the engine as a whole failed, or answered a request twice or never.
    """
    chosen = _chosen(prompts, config)
    requests = [
        SampleRequest.of(prompt, index, sampling, version) for prompt in chosen for index in range(config.samples)
    ]
    row_of = {request.id: position // config.samples for position, request in enumerate(requests)}
    pending: list[dict[int, Completion]] = [{} for _ in chosen]
    tasks: dict[int, asyncio.Task[EvalRow]] = {}
    try:
        # One call with everything, so that the engine decides what is batched with what.
        async for completion in engine.generate(requests):
            row = row_of.pop(completion.request_id, None)
            if row is None:
                raise EngineError(f"engine {engine.caps.name!r} answered {completion.request_id!r}, which is not open")
            pending[row][completion.sample_index] = completion
            if len(pending[row]) == config.samples:
                ordered = [pending[row][index] for index in range(config.samples)]
                tasks[row] = asyncio.create_task(_judge(scorer, chosen[row], ordered, threshold=config.threshold))
        if row_of:
            raise EngineError(
                f"engine {engine.caps.name!r} never answered {len(row_of)} of {len(requests)} requests, "
                f"the first is {next(iter(row_of))!r}"
            )
        rows = await asyncio.gather(*(tasks[row] for row in range(len(chosen))))
    finally:
        for task in tasks.values():
            task.cancel()
    report = build_report(rows, version=version)
    if report.causes:
        logger.warning(
            "evaluation of version %d: %d of %d samples failed, %s: %s",
            version,
            len(report.causes),
            len(requests),
            "so there is no accuracy" if report.nothing_measured else "and count as wrong",
            commonest(report.causes),
        )
    return report


async def _judge(scorer: Scorer, prompt: Prompt, completions: Sequence[Completion], *, threshold: float) -> EvalRow:
    usable = [completion for completion in completions if completion.finish_reason in ("stop", "length")]
    scores = await scorer.score(prompt, usable) if usable else ()
    assert len(scores) == len(usable), f"the scorer gave {len(scores)} scores for {len(usable)} completions"
    judged = {
        completion.sample_index: _scored(completion, score, threshold=threshold)
        for completion, score in zip(usable, scores, strict=True)
    }
    samples = (judged.get(completion.sample_index) or _unusable(completion) for completion in completions)
    return EvalRow(prompt=prompt, samples=tuple(samples))


def _scored(completion: Completion, score: Score, *, threshold: float) -> EvalSample:
    name, first = next(((n, value) for n, value in score.rewards.items() if value is not None), ("", None))
    valid = first is not None and math.isfinite(first) and score.reward is not None and math.isfinite(score.reward)
    failed = score.failed or bool(score.cause) or not valid
    return EvalSample(
        sample_index=completion.sample_index,
        text=completion.text,
        num_tokens=len(completion.token_ids),
        finish_reason=completion.finish_reason,
        rewards=score.rewards,
        reward=score.reward,
        correct=not failed and first is not None and first > threshold,
        counted="" if failed else name,
        failed=failed,
        cause=(score.cause or "no reward function gave a finite value") if failed else "",
    )


def _unusable(completion: Completion) -> EvalSample:
    return EvalSample(
        sample_index=completion.sample_index,
        text=completion.text,
        num_tokens=len(completion.token_ids),
        finish_reason=completion.finish_reason,
        failed=True,
        cause=completion.error or f"the engine ended the completion with {completion.finish_reason!r}",
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
        engine: Engine,
        prompts: Sequence[Prompt],
        *,
        scorer: Scorer,
        config: EvalConfig,
        sampling: SamplingParams,
        on_report: Callable[[int, EvalReport], None] | None = None,
        keep_best: str | None = None,
    ) -> None:
        self.best = Best(keep_best)
        self._engine = engine
        self._prompts = _chosen(prompts, config) if config.every else prompts
        self._scorer = scorer
        self._config = config
        self._sampling = sampling
        self._on_report = on_report
        self._last_step = -1
        self.last_report: EvalReport | None = None

    async def maybe_run(self, step: int, *, final: bool = False, asked: bool = False) -> Metrics:
        """The metrics of the policy after `step` training steps, or nothing when no evaluation is due or asked for."""
        if not self._is_due(step, final=final) and not (asked and step != self._last_step):
            return {}
        report = await evaluate(
            self._engine,
            self._prompts,
            self._scorer,
            config=self._config,
            sampling=self._sampling,
            version=step,
        )
        self._last_step = step
        self.last_report = report
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
