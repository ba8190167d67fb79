"""Groups whose every number the test decides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from groupwise.inputs import ModelInput, SampleKey
from groupwise.types import Completion, Prompt, Rollout, RolloutGroup

MakeGroup = Callable[..., RolloutGroup]


@pytest.fixture
def make_group() -> MakeGroup:
    """`make_group(index, rewards, lengths=…)`; a reward of None makes a rollout without one, "failed" a failed one."""

    def make(index: int, rewards: Sequence[float | str | None], lengths: Sequence[int] | None = None) -> RolloutGroup:
        prompt = Prompt(f"p{index}", (), f"prompt {index}", ModelInput.of((index + 1, 7, 8)), data_source="test")
        sizes = lengths or [2 + i for i in range(len(rewards))]
        rollouts = tuple(_rollout(i, r, n) for i, (r, n) in enumerate(zip(rewards, sizes, strict=True)))
        return RolloutGroup(index, prompt, rollouts)

    return make


def _rollout(index: int, reward: float | str | None, length: int) -> Rollout:
    failed = isinstance(reward, str)
    value = None if isinstance(reward, str) else reward
    written = Completion(
        SampleKey("p", 0, index),
        token_ids=tuple(range(10, 10 + length)),
        logprobs=tuple(-0.5 - 0.01 * t for t in range(length)),
        policy_versions=(3,) * length,
        text=f"answer {index}",
        finish_reason="error" if failed else "length" if length >= 6 else "stop",
    )
    made = Rollout.one_turn(written, rewards={} if failed else {"r": value}, reward=value)
    return replace(made, status="failed", boundary="engine", cause="engine: out of memory") if failed else made
