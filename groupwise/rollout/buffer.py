"""Finished groups between engine and trainer, in index order, with a fixed bound on their age.

A step takes the next P groups of the sampler's stream, and more where some of them teach nothing (`Selection`). All
groups of step s are sampled whole by the weights of version `max(0, s - max_off_policy_steps)`. So what a batch holds
is a function of seed and config alone, whatever the order in which groups finish.
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
        self._end = prompts_per_step
        self._step = 0
        self._failure: BaseException | None = None
        self._changed = asyncio.Event()

    @property
    def next_index(self) -> int:
        """The first index that no step has taken."""
        return self._next

    def step_of(self, index: int) -> int:
        """The step that group `index` serves, from 0, as far as is known now."""
        return self._step + (0 if index < self._end else 1 + (index - self._end) // self._per_step)

    def pin(self, index: int) -> int:
        """The policy version that samples group `index`."""
        return max(0, self.step_of(index) - self._lag)

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
        wanted = range(self._next, self._end)
        while not all(index in self._groups for index in wanted):
            if self._failure is not None:
                raise self._failure
            self._changed.clear()
            await self._changed.wait()
        self._next, self._end = self._end, self._end + self._per_step
        self._step += 1
        return tuple(self._groups.pop(index) for index in wanted)

    def extend(self, count: int) -> None:
        """The step that was just taken takes `count` groups more, of the same version; the next `take` gives them."""
        assert self._lag == 0, "groups of later steps were sampled by other weights already"
        assert self._end == self._next + self._per_step, "a step is extended only once its groups are taken"
        self._end = self._next + count
        self._step -= 1

    def metrics(self) -> Metrics:
        return {"buffer/groups_waiting": Last(float(len(self._groups)))}

    def state_dict(self) -> dict[str, Any]:
        """The position. Groups that wait are sampled again after a resume, with the same result."""
        return {"next_index": self._next, "step": self._step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._next, self._step = int(state["next_index"]), int(state["step"])
        self._end = self._next + self._per_step
        self._groups.clear()
