"""Dynamic sampling over the real producer and buffer: what is kept, what comes in its place, when it gives up."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from groupwise.data import PromptSampler
from groupwise.environments import SINGLE_TURN
from groupwise.inputs import ModelInput
from groupwise.metrics import resolve
from groupwise.protocols import EngineCaps
from groupwise.rewards import RewardScorer
from groupwise.rollout import Buffer, Producer, Selection
from groupwise.rollout.episode import sampled_by
from groupwise.rollout.selection import Selected
from groupwise.types import Completion, Prompt, RolloutGroup, SampleRequest, SamplingParams


class Engine:
    """Finishes groups in any order, and refuses a version that is not the newest."""

    caps = EngineCaps(name="scripted", exact_logprobs=True, seeded=True)

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.version = 0
        self.asked: list[SampleRequest] = []

    async def generate(self, requests: Sequence[SampleRequest]) -> AsyncIterator[Completion]:
        self.asked += requests
        for _ in range(self.random.randrange(4)):
            await asyncio.sleep(0)
        for r in requests:
            assert r.policy_version == self.version
            yield Completion(r.key, (4,), (-0.5,), (r.policy_version,), f"{r.key.sample_index}", "stop")


def mixed(completions: list[str], good: list[bool], **columns: Any) -> list[float]:
    """Rewards that differ only where the prompt is good."""
    return [float(text) if good[0] else 1.0 for text in completions]


def differs(group: RolloutGroup) -> bool:
    return len({r.reward for r in group.rollouts}) > 1


def run(
    pattern: Sequence[bool],
    *,
    cap: int,
    per_step: int = 3,
    steps: int = 2,
    start: dict[str, int] | None = None,
    seed: int = 0,
) -> list[Selected]:
    """`steps` steps over an endless stream of prompts that teach as `pattern` says."""

    async def go() -> list[Selected]:
        prompts = [
            Prompt(f"p{i}", (), "", ModelInput.of((1, 2)), columns={"good": good}) for i, good in enumerate(pattern)
        ]
        sampler = PromptSampler(prompts, seed=0, shuffle=False)
        buffer = Buffer(prompts_per_step=per_step, max_off_policy_steps=0)
        engine: Any = Engine(seed)
        scorer = RewardScorer([], functions=[mixed])
        producer = Producer(
            sampled_by(engine),
            scorer,
            SINGLE_TURN,
            sampler,
            buffer,
            sampling=SamplingParams(),
            group_size=2,
            total_steps=steps,
        )
        selection = Selection(buffer, producer, prompts_per_step=per_step, cap=cap, teaches=differs)
        first = 0
        if start is not None:
            buffer.load_state_dict(start)
            producer.rewind(buffer.next_index)
            first = start["step"]
        found = []
        for step in range(first, steps):
            engine.version = step
            producer.admit(step)
            found.append(await selection.take(step))
        producer.admit(steps)
        assert len(engine.asked) == 2 * sum(len(s.groups) + len(s.dropped) for s in found)
        await producer.close()
        states.append(buffer.state_dict())
        return found

    states: list[dict[str, int]] = []
    return asyncio.run(go())


def indices(groups: Sequence[RolloutGroup]) -> list[int]:
    return [group.index for group in groups]


def test_without_a_cap_every_group_is_learned() -> None:
    first, second = run([True, False], cap=0)
    assert (indices(first.groups), indices(second.groups)) == ([0, 1, 2], [3, 4, 5])
    assert first.dropped == () == second.dropped
    assert first.metrics == {}


def test_groups_that_teach_nothing_are_replaced_by_the_next_prompts() -> None:
    first, second = run([True, False, False, True, False, True, True, True, True, True], cap=3)
    assert indices(first.groups) == [0, 3, 5]
    assert indices(first.dropped) == [1, 2, 4]
    assert indices(second.groups) == [6, 7, 8]
    assert resolve(first.metrics) == {
        "dynamic_sampling/sampled": 6,
        "dynamic_sampling/dropped": 3,
        "dynamic_sampling/missing": 0,
    }


def test_at_the_cap_it_goes_on_with_what_there_is_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="groupwise"):
        (only,) = run([True, False, False, False], cap=2, steps=1)
    assert indices(only.groups) == [0, 4]
    assert indices(only.dropped) == [1, 2, 3, 5]
    assert resolve(only.metrics)["dynamic_sampling/missing"] == 1
    (record,) = caplog.records
    assert "step 1: 2 of 6 prompts sampled teach something, of 3 wanted" in record.getMessage()


def test_a_step_in_which_nothing_teaches_is_empty() -> None:
    first, second = run([False], cap=2)
    assert first.groups == ()
    assert len(first.dropped) == 6
    assert indices(second.dropped) == [6, 7, 8, 9, 10, 11]


@settings(max_examples=25, deadline=None)
@given(pattern=st.lists(st.booleans(), min_size=1, max_size=12), seed=st.integers(0, 99), cap=st.integers(2, 4))
def test_what_is_selected_is_a_function_of_the_stream(pattern: list[bool], seed: int, cap: int) -> None:
    found, again = run(pattern, cap=cap, steps=3), run(pattern, cap=cap, steps=3, seed=seed)
    assert found == again
    used = [index for s in found for index in sorted((*indices(s.groups), *indices(s.dropped)))]
    assert used == list(range(len(used)))
    for selected in found:
        assert all(differs(group) for group in selected.groups)
        assert len(selected.groups) == 3 or len(selected.groups) + len(selected.dropped) == 3 * cap
    taken = len(found[0].groups) + len(found[0].dropped)
    resumed = run(pattern, cap=cap, steps=3, start={"next_index": taken, "step": 1})
    assert resumed == found[1:]
