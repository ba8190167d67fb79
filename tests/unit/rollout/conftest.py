"""Groups whose every number the test decides."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from groupwise.types import Prompt, Rollout, RolloutGroup

MakeGroup = Callable[..., RolloutGroup]


@pytest.fixture
def make_group() -> MakeGroup:
    """`make_group(index, rewards, lengths=…)`; a reward of None makes a rollout without one, "failed" a failed one."""

    def make(index: int, rewards: Sequence[float | str | None], lengths: Sequence[int] | None = None) -> RolloutGroup:
        prompt = Prompt(f"p{index}", (), f"prompt {index}", (index + 1, 7, 8), data_source="test")
        sizes = lengths or [2 + i for i in range(len(rewards))]
        rollouts = tuple(_rollout(i, r, n) for i, (r, n) in enumerate(zip(rewards, sizes, strict=True)))
        return RolloutGroup(index, prompt, rollouts)

    return make


def _rollout(index: int, reward: float | str | None, length: int) -> Rollout:
    failed = isinstance(reward, str)
    value = None if isinstance(reward, str) else reward
    return Rollout(
        sample_index=index,
        token_ids=tuple(range(10, 10 + length)),
        loss_mask=(0 if failed else 1,) * length,
        logprobs=tuple(-0.5 - 0.01 * t for t in range(length)),
        policy_versions=(3,) * length,
        text=f"answer {index}",
        finish_reason="error" if failed else "length" if length >= 6 else "stop",
        rewards={} if failed else {"r": value},
        reward=value,
        status="failed" if failed else "ok",
        cause="engine: out of memory" if failed else "",
    )
