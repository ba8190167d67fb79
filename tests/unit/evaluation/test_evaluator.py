"""The evaluator's accounting, over an engine and a scorer whose behaviour each row's text prescribes."""

from __future__ import annotations

import asyncio
import json
import math
import random
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field

import pytest

from groupwise.config import Config, EvalConfig, RewardConfig, RolloutConfig, TrainConfig
from groupwise.errors import DataError, EngineError
from groupwise.evaluation import EvalReport, Evaluator, evaluate
from groupwise.evaluation.counted import counted_remarks, counted_rewards
from groupwise.files import json_line
from groupwise.inputs import ModelInput
from groupwise.metrics import resolve
from groupwise.protocols import EngineCaps
from groupwise.rewards import RewardScorer
from groupwise.rollout.episode import sampled_by
from groupwise.rollout.sampling import eval_sampling
from groupwise.trajectories import eval_from_json, eval_to_json
from groupwise.types import Completion, FinishReason, Prompt, Rollout, SampleRequest, SamplingParams

ANSWERS: dict[str, Sequence[str]] = {}
"""What the engine says to each prompt."""

SAMPLING = SamplingParams(temperature=0.0, max_tokens=8, seed=3)


class ScriptedEngine:
    """Answers in shuffled order. `ANSWERS` gives each sample's text, `!` prefixes a failure."""

    caps = EngineCaps(name="scripted", exact_logprobs=True, seeded=True)

    def __init__(self) -> None:
        self.calls: list[list[SampleRequest]] = []
        self.order = random.Random(0)
        self.drop = 0
        self.repeat = False

    async def abort(self, request_ids: Sequence[str] | None = None) -> None: ...

    async def close(self) -> None: ...

    async def generate(self, requests: Sequence[SampleRequest]) -> AsyncIterator[Completion]:
        self.calls.append(list(requests))
        shuffled = list(requests)
        self.order.shuffle(shuffled)
        for request in shuffled[self.drop :] + (shuffled[:1] if self.repeat else []):
            await asyncio.sleep(0)
            text = ANSWERS[request.key.uid][request.key.sample_index]
            reason: FinishReason = "error" if text == "!error" else "abort" if text == "!abort" else "stop"
            reason = "length" if text.startswith("long") else reason
            n = 0 if reason == "error" else 8 if reason == "length" else 2
            yield Completion(
                key=request.key,
                token_ids=(1,) * n,
                logprobs=(0.0,) * n,
                policy_versions=(request.policy_version,) * n,
                text=text,
                finish_reason=reason,
                error="out of memory" if reason == "error" else "",
            )


@dataclass(frozen=True)
class FakeScore:
    reward: float | None
    rewards: Mapping[str, float | None] = field(default_factory=dict)
    failed: bool = False
    cause: str = ""


class TextScorer:
    """`right` earns 1 from the first reward; `styled` only from the second; others prescribe a kind of failure."""

    def __init__(self) -> None:
        self.scored: list[str] = []

    async def score(self, prompt: Prompt, rollouts: Sequence[Rollout]) -> list[FakeScore]:
        self.scored.append(prompt.uid)
        await asyncio.sleep(0)
        return [self._one(rollout.text) for rollout in rollouts]

    def _one(self, text: str) -> FakeScore:
        special = {
            "!raise": FakeScore(None, {"gsm8k": None}, failed=True, cause="gsm8k raised ValueError"),
            "!none": FakeScore(None, {"gsm8k": None, "format": None}),
            "!nan": FakeScore(math.nan, {"gsm8k": math.nan}),
            "styled": FakeScore(5.0, {"gsm8k": 0.0, "format": 5.0}),
            "other": FakeScore(1.0, {"gsm8k": None, "format": 1.0}),
            "half": FakeScore(0.5, {"gsm8k": 0.5}),
        }
        value = float("right" in text)
        return special.get(text, FakeScore(value * 0.5, {"gsm8k": value, "format": 0.0}))


def prompt(uid: str, *answers: str) -> Prompt:
    ANSWERS[uid] = answers
    return Prompt(uid=uid, messages=(), text=f"q {uid}", input=ModelInput.of((1, 2)), columns={"answers": answers})


def run(prompts: Sequence[Prompt], *, engine: ScriptedEngine | None = None, **config: object) -> EvalReport:
    return asyncio.run(
        evaluate(
            sampled_by(engine or ScriptedEngine()),
            prompts,
            TextScorer(),
            config=EvalConfig.model_validate(config),
            sampling=SAMPLING,
            version=7,
        )
    )


def test_each_row_once_and_in_one_call() -> None:
    engine = ScriptedEngine()
    prompts = [prompt(f"r{i}", "right", "wrong", "long", "right") for i in range(9)]
    report = run(prompts, engine=engine, samples=4)
    asked = [request for call in engine.calls for request in call]
    assert Counter(r.id for r in asked) == Counter(f"r{i}/0/{j}" for i in range(9) for j in range(4))
    assert all(request.sampling == SAMPLING for request in asked)
    assert [row.prompt.uid for row in report.rows] == [p.uid for p in prompts]
    assert all([s.sample_index for s in row.samples] == [0, 1, 2, 3] for row in report.rows)
    assert report.accuracy == pytest.approx(0.5)
    assert report.pass_at_k == pytest.approx({1: 0.5, 2: 1 - 1 / 6, 4: 1.0})
    assert report.mean_length == pytest.approx((2 * 3 + 8) / 4)
    assert report.clipped_ratio == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("bad", "cause"),
    [
        ("!error", "out of memory"),
        ("!abort", "abort"),
        ("!raise", "ValueError"),
        ("!none", "no reward"),
        ("!nan", "finite"),
    ],
)
def test_a_failure_of_any_kind_is_wrong_and_counted(bad: str, cause: str) -> None:
    report = run([prompt("a", "right"), prompt("b", bad), prompt("c", "wrong")])
    assert report.accuracy == pytest.approx(1 / 3)
    assert report.num_failed == 1
    assert report.mean_reward == pytest.approx(0.25)
    assert cause in report.rows[1].samples[0].cause
    assert [row.failed for row in report.rows] == [False, True, False]


def test_one_failed_sample_leaves_the_row_its_others() -> None:
    report = run([prompt("a", "right", "!error", "right", "wrong")], samples=4)
    assert report.accuracy == pytest.approx(0.5)
    assert report.num_failed == 1


def test_where_everything_failed_nothing_was_measured(caplog: pytest.LogCaptureFixture) -> None:
    report = run([prompt("a", "!error"), prompt("b", "!raise"), prompt("c", "!raise")])
    assert report.nothing_measured
    assert (report.mean_reward, report.num_failed, report.accuracy_of, report.pass_at_k) == (None, 3, (), {})
    assert {"eval/reward", "eval/accuracy"}.isdisjoint(report.metrics())
    assert json.loads(json.dumps(report.summary(), allow_nan=False))["accuracy"] is None
    [record] = caplog.records
    assert record.getMessage() == (
        "evaluation of version 7: 3 of 3 samples failed, so there is no accuracy: gsm8k raised ValueError (2 of 3)"
    )


def test_some_failures_are_told_of_and_none_is_not(caplog: pytest.LogCaptureFixture) -> None:
    run([prompt("a", "right")])
    assert not caplog.records
    run([prompt("a", "right"), prompt("b", "!raise")])
    assert "1 of 2 samples failed, and count as wrong: gsm8k raised ValueError (1 of 1)" in caplog.text


def test_values_that_stand_for_errors_are_failures() -> None:
    class Zeros(TextScorer):
        def _one(self, text: str) -> FakeScore:
            return FakeScore(0.0, {"gsm8k": 0.0}, cause="reward 'gsm8k' failed: KeyError")

    config = EvalConfig.model_validate({"threshold": -1.0})
    work = evaluate(
        sampled_by(ScriptedEngine()),
        [prompt("a", "x")],
        Zeros(),
        config=config,
        sampling=SAMPLING,
        version=0,
    )
    report = asyncio.run(work)
    assert report.nothing_measured
    assert report.rows[0].samples[0].cause == "reward 'gsm8k' failed: KeyError"


def test_accuracy_names_the_rewards_that_it_counts() -> None:
    report = run([prompt("a", "styled"), prompt("b", "other"), prompt("c", "half"), prompt("d", "!raise")])
    assert report.accuracy_of == ("gsm8k", "format")
    assert report.summary()["accuracy_of"] == ["gsm8k", "format"]
    assert [row.samples[0].counted for row in report.rows] == ["gsm8k", "format", "gsm8k", ""]


def test_a_first_reward_that_is_not_the_heaviest_is_told_of() -> None:
    def scorer(*rewards: dict[str, object]) -> RewardScorer:
        return RewardScorer([RewardConfig.model_validate(each) for each in rewards])

    light = {"name": "format", "weight": 0.2}
    assert counted_remarks(scorer(light, {"name": "gsm8k"}), ["openai/gsm8k"]) == [
        "accuracy counts the first reward, 'format' (weight 0.2), and 'gsm8k' weighs more (1); name 'gsm8k' first to "
        "count that"
    ]
    assert counted_remarks(scorer({"name": "gsm8k"}, light), ["openai/gsm8k"]) == []
    routed = scorer({**light, "data_source": ["a"]}, {"name": "gsm8k", "data_source": ["b"]})
    assert counted_remarks(routed, ["a", "b"]) == []
    assert counted_rewards(routed, ["b", "a", "b"]) == "gsm8k, format"


def test_correct_is_the_first_reward_that_applies_not_the_sum() -> None:
    report = run([prompt("a", "styled"), prompt("b", "other"), prompt("c", "half")])
    assert [row.samples[0].correct for row in report.rows] == [False, True, True]
    report = run([prompt("c", "half"), prompt("d", "right")], threshold=0.5)
    assert [row.samples[0].correct for row in report.rows] == [False, True]


def test_limit_takes_the_first_rows() -> None:
    report = run([prompt("a", "right"), prompt("b", "wrong")], limit=1)
    assert (report.num_rows, report.accuracy) == (1, 1.0)


def test_no_prompts_is_a_data_error() -> None:
    with pytest.raises(DataError, match=r"no rows.*max_prompt_tokens"):
        run([])


def test_an_engine_that_loses_or_repeats_answers_is_refused() -> None:
    engine = ScriptedEngine()
    engine.drop = 1
    with pytest.raises(EngineError, match=r"'scripted' answered nothing to 0/0/0; expected it once"):
        run([prompt(str(i), "right") for i in range(5)], engine=engine)
    engine = ScriptedEngine()
    engine.repeat = True
    with pytest.raises(EngineError, match=r"answered 0/0/0, 0/0/0 to 0/0/0"):
        run([prompt(str(i), "right") for i in range(5)], engine=engine)


def test_a_scorer_that_stops_the_run_does() -> None:
    class Stops:
        async def score(self, prompt: Prompt, rollouts: Sequence[Rollout]) -> list[FakeScore]:
            raise RuntimeError("on_error = stop")

    with pytest.raises(RuntimeError, match="on_error"):
        asyncio.run(
            evaluate(
                sampled_by(ScriptedEngine()),
                [prompt("a", "right"), prompt("b", "right")],
                Stops(),
                config=EvalConfig.model_validate({}),
                sampling=SAMPLING,
                version=0,
            )
        )


def test_metrics_and_records() -> None:
    report = run([prompt("ä", "right 🦊", "wrong", "right", "wrong")], samples=4)
    values = resolve(report.metrics())
    assert list(values) == [
        "eval/accuracy",
        "eval/pass@2",
        "eval/pass@4",
        "eval/reward",
        "eval/reward_std",
        "eval/frac_reward_zero_std",
        "eval/rewards/gsm8k/mean",
        "eval/rewards/gsm8k/std",
        "eval/rewards/format/mean",
        "eval/rewards/format/std",
        "eval/mean_length",
        "eval/min_length",
        "eval/max_length",
        "eval/clipped_ratio",
        "eval/failed",
    ]
    assert values["eval/rewards/gsm8k/std"] == pytest.approx(3**-0.5)  # 1, 0, 1, 0
    assert values["eval/frac_reward_zero_std"] == 0.0
    assert values["eval/pass@4"] == 1.0
    records = list(report.records())
    assert [row.correct for row in records] == [True, False, True, False]
    assert [eval_from_json(json.loads(json_line(eval_to_json(row)))) for row in records] == records
    assert (records[0].text, records[0].policy_version) == ("right 🦊", 7)


def test_three_samples_report_pass_at_1_and_2() -> None:
    assert list(run([prompt("a", "right", "wrong", "wrong")], samples=3).pass_at_k) == [1, 2]


def test_eval_sampling_takes_eval_settings_and_the_training_stops() -> None:
    rollout = RolloutConfig.model_validate(
        {
            "temperature": 0.9,
            "top_k": 5,
            "min_p": 0.1,
            "stop": ["###"],
            "stop_token_ids": [9],
            "repetition_penalty": 1.1,
            "min_completion_tokens": 50,
        }
    )
    own = EvalConfig.model_validate({"temperature": 0.3, "top_p": 0.8, "max_completion_tokens": 20})
    train = TrainConfig.model_validate({"seed": 4})
    assert eval_sampling(Config(rollout=rollout, eval=own, train=train)) == SamplingParams(  # pyright: ignore[reportCallIssue]
        temperature=0.3,
        top_p=0.8,
        repetition_penalty=1.1,
        max_tokens=20,
        min_tokens=20,
        stop=("###",),
        stop_token_ids=(9,),
        seed=4,
    )
    assert eval_sampling(Config(rollout=rollout)).max_tokens == 512  # pyright: ignore[reportCallIssue]


def due_steps(
    steps: int, *, start: int = 0, state: dict[str, object] | None = None, **config: object
) -> tuple[list[int], Evaluator]:
    seen: list[int] = []
    evaluator = Evaluator(
        sampled_by(ScriptedEngine()),
        [prompt("a", "right")],
        scorer=TextScorer(),
        config=EvalConfig.model_validate(config),
        sampling=SAMPLING,
        on_report=lambda step, report: seen.append(step),
    )
    if state is not None:
        evaluator.load_state_dict(state)

    async def loop() -> None:
        for step in range(start, steps + 1):
            metrics = await evaluator.maybe_run(step, final=step == steps)
            assert bool(metrics) == (bool(seen) and seen[-1] == step)

    asyncio.run(loop())
    return seen, evaluator


def test_cadence() -> None:
    assert due_steps(7, every=3)[0] == [0, 3, 6, 7]
    assert due_steps(6, every=3)[0] == [0, 3, 6]
    assert due_steps(7, every=3, at_start=False)[0] == [3, 6, 7]
    assert due_steps(7, every=0)[0] == []
    assert due_steps(2, every=100, at_start=False)[0] == [2]


def test_a_resumed_run_does_not_repeat_an_evaluation() -> None:
    seen, evaluator = due_steps(3, every=3)
    assert seen == [0, 3]
    state = json.loads(json.dumps(evaluator.state_dict()))
    assert due_steps(7, start=3, every=3, state=state)[0] == [6, 7]
    assert due_steps(7, start=3, every=3)[0] == [3, 6, 7]


def test_evaluator_refuses_empty_data_only_when_it_would_run() -> None:
    def build(every: int) -> Evaluator:
        return Evaluator(
            sampled_by(ScriptedEngine()),
            [],
            scorer=TextScorer(),
            config=EvalConfig.model_validate({"every": every}),
            sampling=SAMPLING,
        )

    build(0)
    with pytest.raises(DataError):
        build(5)
