"""Which of the sampled groups a step learns from: all, or those that teach something, and fresh ones for the rest."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from groupwise.metrics import Metric, Metrics, Sum
from groupwise.rollout.buffer import Buffer
from groupwise.rollout.producer import Producer
from groupwise.types import RolloutGroup

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Selected:
    """What one step learns from, in index order, and what was sampled for it beside that."""

    groups: tuple[RolloutGroup, ...]
    dropped: tuple[RolloutGroup, ...] = ()
    metrics: Metrics = field(default_factory=dict[str, Metric])


@dataclass(frozen=True, slots=True)
class Selection:
    """Takes each step's groups from the buffer; with a `cap`, DAPO's dynamic sampling (arXiv:2503.14476, section 3.2).

    A round asks for exactly as many prompts as are missing, so every group that was sampled is either learned from or
    dropped, and the next prompt of the stream is all the state there is.

    Attributes:
        cap: most prompts of one step, in multiples of `prompts_per_step`; 0 keeps every group.
        teaches: whether a group is kept.
    """

    buffer: Buffer
    producer: Producer
    prompts_per_step: int
    cap: int
    teaches: Callable[[RolloutGroup], bool]

    async def take(self, step: int) -> Selected:
        """The groups of `step` (from 0), which may be fewer than `prompts_per_step` when the cap is reached."""
        groups = list(await self.buffer.take())
        if not self.cap:
            return Selected(tuple(groups))
        kept = [group for group in groups if self.teaches(group)]
        most = self.cap * self.prompts_per_step
        while missing := min(self.prompts_per_step - len(kept), most - len(groups)):
            self.buffer.extend(missing)
            self.producer.admit(step)
            more = await self.buffer.take()
            groups += more
            kept += [group for group in more if self.teaches(group)]
        if len(kept) < self.prompts_per_step:
            logger.warning(
                "step %d: %d of %d prompts sampled teach something, of %d wanted; training with these "
                "(rollout.dynamic_sampling_cap = %d)",
                step + 1,
                len(kept),
                len(groups),
                self.prompts_per_step,
                self.cap,
            )
        chosen = {group.index for group in kept}
        dropped = tuple(group for group in groups if group.index not in chosen)
        metrics = {
            "dynamic_sampling/sampled": Sum(float(len(groups))),
            "dynamic_sampling/dropped": Sum(float(len(dropped))),
            "dynamic_sampling/missing": Sum(float(self.prompts_per_step - len(kept))),
        }
        return Selected(tuple(kept), dropped, metrics)
