"""Log-probs that the algorithm asks for before it can learn from a step's groups: the policy's own, other scorers'."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from groupwise.algorithms import Algorithm
from groupwise.batches import ScoreRequest
from groupwise.protocols import Policy
from groupwise.rollout.batch import is_learnable
from groupwise.types import Rollout, RolloutGroup, Segment


@dataclass(frozen=True, slots=True)
class LogprobPass:
    """One forward without gradient over a step's rollouts, for each scorer that is wanted.

    Attributes:
        old: ask the policy, as it is before the step's first update.
        stands_in: the engine has no log-probs of what it drew: the policy's stand for them.
        algorithm: says which others to ask, whose log-probs go into `Rollout.scores`.

    Example:
        groups = await LogprobPass(policy, algorithm, old=True).add(groups)
    """

    policy: Policy
    algorithm: Algorithm
    old: bool
    stands_in: bool = False

    async def add(self, groups: Sequence[RolloutGroup]) -> tuple[RolloutGroup, ...]:
        """The groups, with `old_logprobs` and `scores` in every rollout that can be learned from."""
        asked = {
            (group.index, rollout.sample_index): _request(group, rollout)
            for group in groups
            for rollout in group.rollouts
            if is_learnable(rollout, self.algorithm)
        }
        if not asked or not (self.old or self.algorithm.scorers):
            return tuple(groups)
        requests = list(asked.values())
        old = dict(zip(asked, await self.policy.log_probs(requests), strict=True)) if self.old else {}
        scores = {
            name: dict(zip(asked, await self.policy.log_probs(requests, of=name), strict=True))
            for name in self.algorithm.scorers
        }

        def filled(group: RolloutGroup, rollout: Rollout) -> Rollout:
            key = (group.index, rollout.sample_index)
            if key not in asked:
                return rollout
            found = {name: values[key] for name, values in scores.items()}
            filled = replace(rollout, old_logprobs=old.get(key), scores={**rollout.scores, **found})
            return _with_logprobs(filled, old[key]) if self.stands_in else filled

        return tuple(replace(group, rollouts=tuple(filled(group, r) for r in group.rollouts)) for group in groups)


def _with_logprobs(rollout: Rollout, logprobs: Sequence[float]) -> Rollout:
    """The model's own segments with these, `[T]`."""
    segments, first = list[Segment](), 0
    for segment in rollout.segments:
        last = first + len(segment.token_ids)
        mine = tuple(logprobs[first:last]) if segment.by == "model" else segment.logprobs
        segments.append(replace(segment, logprobs=mine))
        first = last
    return replace(rollout, segments=tuple(segments))


def _request(group: RolloutGroup, rollout: Rollout) -> ScoreRequest:
    return ScoreRequest(rollout.prompt or group.prompt.input, rollout.input, sides=rollout.sides)
