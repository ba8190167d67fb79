"""One choice of experts for the prompt of a group.

Engines compute a prompt in other batches for one sample than for the next, and may choose otherwise where scores are
close. The trainer computes it once for all of its samples, so they have to agree: the first sample's choices stand for
the group, whatever micro-batch a sample is learned in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from groupwise.inputs import ModelInput
from groupwise.metrics import Mean, Metric
from groupwise.sides import Routes
from groupwise.types import Rollout, RolloutGroup


def with_one_choice(groups: Sequence[RolloutGroup]) -> tuple[tuple[RolloutGroup, ...], dict[str, Metric]]:
    """The groups, in which rollouts with equal prompts have equal choices there; and `moe/prompt_differs`, the share of
    prompts' tokens that had others than the first sample's. Nothing where no routes were told."""
    if all(rollout.sides.routes is None for group in groups for rollout in group.rollouts):
        return tuple(groups), {}
    compared = differing = 0
    settled: list[RolloutGroup] = []
    for group in groups:
        first: dict[ModelInput, Routes] = {}
        rollouts: list[Rollout] = []
        for rollout in group.rollouts:
            prompt = rollout.prompt or group.prompt.input
            routes = None if rollout.status == "failed" else rollout.sides.routes
            if routes is None or prompt not in first:
                if routes is not None:
                    first[prompt] = routes
                rollouts.append(rollout)
                continue
            others = _differing(first[prompt], routes, len(prompt))
            compared, differing = compared + len(prompt), differing + others
            rollouts.append(_with_beginning(rollout, first[prompt], len(prompt)) if others else rollout)
        settled.append(replace(group, rollouts=tuple(rollouts)))
    return tuple(settled), {"moe/prompt_differs": Mean(float(differing), float(compared))} if compared else {}


def _differing(one: Routes, other: Routes, tokens: int) -> int:
    """Tokens, of so many, whose rows are not the same."""
    if one.part(0, tokens) == other.part(0, tokens):
        return 0
    return sum(one.part(at, at + 1) != other.part(at, at + 1) for at in range(tokens))


def _with_beginning(rollout: Rollout, first: Routes, tokens: int) -> Rollout:
    """With these rows for the prompt: the first turn has them."""
    segment, *rest = rollout.segments
    assert segment.sides.routes is not None, "a rollout begins with a turn"
    sides = replace(segment.sides, routes=segment.sides.routes.with_beginning(first, tokens))
    return replace(rollout, segments=(replace(segment, sides=sides), *rest))
