"""The producer over an engine whose failures the prompt's columns prescribe, with the real scorer."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest

from groupwise.data import PromptSampler
from groupwise.environments import SINGLE_TURN
from groupwise.errors import CheckpointError, EngineError
from groupwise.inputs import ModelInput, SampleKey
from groupwise.protocols import EngineCaps
from groupwise.rewards import RewardScorer
from groupwise.rollout import Buffer, Producer
from groupwise.rollout.episode import run_group, sampled_by
from groupwise.types import Completion, FinishReason, Prompt, RolloutGroup, SampleRequest, SamplingParams

COLUMNS: dict[str, dict[str, Any]] = {}
"""Of every prompt, by its uid: a request holds what a model is given, and no more."""


class ScriptedEngine:
    """Answers in shuffled order; `ends` of a prompt's columns says how each sample ends."""

    caps = EngineCaps(name="scripted", exact_logprobs=True, seeded=True)

    def __init__(self) -> None:
        self.asked: list[SampleRequest] = []

    async def abort(self, request_ids: Sequence[str] | None = None) -> None: ...

    async def close(self) -> None: ...

    async def generate(self, requests: Sequence[SampleRequest]) -> AsyncIterator[Completion]:
        self.asked += requests
        if "broken" in COLUMNS[requests[0].key.uid]:
            raise EngineError("the engine is gone")
        shuffled = list(requests)
        random.Random(3).shuffle(shuffled)
        for request in shuffled:
            await asyncio.sleep(0)
            ends = COLUMNS[request.key.uid].get("ends", ())
            reason: FinishReason = ends[request.key.sample_index] if ends else "stop"
            n = 0 if reason == "error" else 1 if reason == "abort" else request.key.sample_index + 1
            yield Completion(
                key=request.key,
                token_ids=(4,) * n,
                logprobs=(-0.5,) * n,
                policy_versions=(request.policy_version,) * n,
                text=f"text {request.key.sample_index}",
                finish_reason=reason,
                error="out of memory" if reason == "error" else "",
            )


def digits(completions: list[str], **columns: Any) -> list[float]:
    return [float(text[-1]) for text in completions]


def prompt(name: str, **columns: Any) -> Prompt:
    COLUMNS[name] = columns
    return Prompt(name, (), name, ModelInput.of((1, 2)), columns=columns)


def group_of(asked: Prompt, scorer: RewardScorer, size: int = 4) -> RolloutGroup:
    keys = [SampleKey(asked.uid, 0, i) for i in range(size)]
    sample = sampled_by(ScriptedEngine())
    group = run_group(sample, scorer, SINGLE_TURN, asked, keys=keys, sampling=SamplingParams(), version=7, index=3)
    return asyncio.run(group)


def test_a_group_is_sampled_and_scored_in_sample_order() -> None:
    group = group_of(prompt("a"), RewardScorer([], functions=[digits]))
    assert group.index == 3
    assert [r.sample_index for r in group.rollouts] == [0, 1, 2, 3]
    assert [r.reward for r in group.rollouts] == [0.0, 1.0, 2.0, 3.0]
    assert [r.rewards for r in group.rollouts] == [{"digits": float(i)} for i in range(4)]
    assert group.rollouts[2].loss_mask == (1, 1, 1)
    assert group.rollouts[2].policy_versions == (7, 7, 7)
    assert all(r.status == "ok" for r in group.rollouts)


def test_failed_completions_become_failed_rollouts_and_are_not_scored() -> None:
    seen: list[list[str]] = []

    def watch(completions: list[str], **columns: Any) -> list[float]:
        seen.append(list(completions))
        return [1.0] * len(completions)

    ends = ("stop", "error", "length", "abort")
    group = group_of(prompt("a", ends=ends), RewardScorer([], functions=[watch]))
    assert seen == [["text 0", "text 2"]]
    assert [r.status for r in group.rollouts] == ["ok", "failed", "ok", "failed"]
    assert [r.reward for r in group.rollouts] == [1.0, None, 1.0, None]
    assert group.rollouts[1].cause == "out of memory"
    assert "'abort'" in group.rollouts[3].cause
    assert group.rollouts[3].loss_mask == (0,)


def test_a_group_without_any_usable_completion_asks_no_reward() -> None:
    def never(completions: list[str], **columns: Any) -> list[float]:
        raise AssertionError("called")

    group = group_of(prompt("a", ends=("error",) * 2), RewardScorer([], functions=[never]), 2)
    assert [r.status for r in group.rollouts] == ["failed", "failed"]


def test_a_reward_that_raises_fails_the_rollouts_with_its_cause() -> None:
    def bad(completions: list[str], **columns: Any) -> list[float]:
        raise KeyError("answer")

    group = group_of(prompt("a"), RewardScorer([], functions=[bad]))
    assert all(r.status == "failed" and r.reward is None for r in group.rollouts)
    assert "KeyError" in group.rollouts[0].cause


def make(
    prompts: Sequence[Prompt], *, per_step: int = 2, lag: int = 0, total: int = 8, seed: int = 5
) -> tuple[Producer, Buffer, ScriptedEngine]:
    engine, held = ScriptedEngine(), Buffer(prompts_per_step=per_step, max_off_policy_steps=lag)
    producer = Producer(
        sampled_by(engine),
        RewardScorer([], functions=[digits]),
        SINGLE_TURN,
        PromptSampler(prompts, seed=seed, shuffle=False),
        held,
        sampling=SamplingParams(seed=seed),
        group_size=2,
        total_steps=total // per_step,
    )
    return producer, held, engine


PROMPTS = [prompt(name) for name in "abcd"]


def test_admit_starts_what_the_version_allows_and_no_more() -> None:
    async def run() -> None:
        producer, held, engine = make(PROMPTS, total=6)
        for version in range(4):
            producer.admit(version)
            await asyncio.sleep(0.05)
            assert len(engine.asked) == min(4 * (version + 1), 12)
            assert {r.policy_version for r in engine.asked[4 * version :]} <= {version}
            if version < 3:
                assert [g.index for g in await held.take()] == [2 * version, 2 * version + 1]
        await producer.close()

    asyncio.run(run())


def test_a_lag_admits_ahead() -> None:
    async def run() -> None:
        producer, _, engine = make(PROMPTS, lag=1)
        producer.admit(0)
        await asyncio.sleep(0.05)
        assert len(engine.asked) == 2 * 2 * 2
        await producer.close()

    asyncio.run(run())


def test_an_engine_that_fails_ends_the_wait_with_its_error() -> None:
    async def run() -> None:
        producer, held, _ = make([prompt("gone", broken=True), prompt("b")])
        producer.admit(0)
        with pytest.raises(EngineError, match="gone"):
            await held.take()
        await producer.close()

    asyncio.run(run())


def test_a_prompt_that_comes_again_is_drawn_anew() -> None:
    """An engine's draws are a function of seed and key: the same key in each epoch would sample the same."""

    async def keys(count: int) -> set[str]:
        producer, held, engine = make(PROMPTS[:count], per_step=8, total=8)
        producer.admit(0)
        await held.take()
        await producer.close()
        return {r.id for r in engine.asked}

    assert len(asyncio.run(keys(2))) == 16
    assert len(asyncio.run(keys(4))) == 16


def test_the_first_epoch_is_drawn_with_the_runs_seed() -> None:
    async def run() -> None:
        producer, held, engine = make(PROMPTS)
        producer.admit(0)
        await held.take()
        assert {r.sampling.seed for r in engine.asked} == {5}

    asyncio.run(run())


def test_rewind_asks_for_the_same_requests_again() -> None:
    async def run() -> None:
        producer, held, engine = make(PROMPTS)
        for version in range(3):
            producer.admit(version)
            await held.take()
        first = engine.asked[4:]
        other, restored, again = make(PROMPTS)
        other.load_state_dict(producer.state_dict())
        restored.load_state_dict({"next_index": 2, "step": 1})
        other.rewind(2)
        for version in (1, 2):
            other.admit(version)
            await restored.take()
        assert sorted(r.id for r in again.asked) == sorted(r.id for r in first)

    asyncio.run(run())


def test_a_resume_with_other_prompts_is_refused() -> None:
    producer, _, _ = make(PROMPTS)
    other, _, _ = make([*PROMPTS[:3], prompt("z")])
    with pytest.raises(CheckpointError, match="other data"):
        other.load_state_dict(producer.state_dict())


def test_close_ends_what_is_under_way() -> None:
    async def run() -> int:
        producer, _, _ = make(PROMPTS)
        producer.admit(0)
        await producer.close()
        return len(asyncio.all_tasks())

    assert asyncio.run(run()) == 1
