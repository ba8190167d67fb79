"""Finished groups between engine and trainer, in index order, with a fixed bound on their age.

Group k of the sampler's stream serves training step `k // prompts_per_step`, and is sampled whole by the weights of
version `max(0, k // prompts_per_step - max_off_policy_steps)`. So what a batch holds is a function of seed and config
alone, whatever the order in which groups finish.
"""

from __future__ import annotations

import asyncio
from typing import Any

from groupwise.metrics import Last, Metrics
from groupwise.types import RolloutGroup


class Buffer:
    """Holds finished groups until their step takes them.

    Args:
        prompts_per_step: P, groups of one step.
        max_off_policy_steps: M, the age of every group in versions, once M versions exist.
    """

    def __init__(self, *, prompts_per_step: int, max_off_policy_steps: int) -> None:
        self._per_step = prompts_per_step
        self._lag = max_off_policy_steps
        self._groups: dict[int, RolloutGroup] = {}
        self._next = 0
        self._failure: BaseException | None = None
        self._changed = asyncio.Event()

    @property
    def next_index(self) -> int:
        """The first index that no step has taken."""
        return self._next

    def pin(self, index: int) -> int:
        """The policy version that samples group `index`."""
        return max(0, index // self._per_step - self._lag)

    def put(self, group: RolloutGroup) -> None:
        assert group.index >= self._next, f"group {group.index} comes after its step was trained"
        assert group.index not in self._groups, f"group {group.index} was put twice"
        self._groups[group.index] = group
        self._changed.set()

    def fail(self, error: BaseException) -> None:
        """Make the waiting `take` raise: a group will never come."""
        self._failure = self._failure or error
        self._changed.set()

    async def take(self) -> tuple[RolloutGroup, ...]:
        """The next step's groups in index order, as soon as all of them are there."""
        wanted = range(self._next, self._next + self._per_step)
        while not all(index in self._groups for index in wanted):
            if self._failure is not None:
                raise self._failure
            self._changed.clear()
            await self._changed.wait()
        self._next += self._per_step
        return tuple(self._groups.pop(index) for index in wanted)

    def metrics(self) -> Metrics:
        return {"buffer/groups_waiting": Last(float(len(self._groups)))}

    def state_dict(self) -> dict[str, Any]:
        """The position. Groups that wait are sampled again after a resume, with the same result."""
        return {"next_index": self._next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._next = int(state["next_index"])
        self._groups.clear()
