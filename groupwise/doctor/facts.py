"""What a step's samples say beyond its metrics: a few more numbers, for rules alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from groupwise.types import Rollout, RolloutGroup

Facts = dict[str, float]


def sample_facts(groups: Sequence[RolloutGroup]) -> Facts:
    """Numbers of a step's groups `[P]` of rollouts `[G]`; nothing where nothing was sampled.

    Returns:
        `share_empty`, `share_identical`: of answers without text, of groups in which all answers are one text.
        `surprise`: nats per token, mean of -log p by the sampler: the policy's entropy, estimated by its own draws.
        `asked/NAME`, `low/NAME`, `high/NAME`: samples that the reward was asked about, and its extremes.
        `length_xx`, `reward_yy`, `length_reward_xy`, `compared`: sums of squares and products of lengths (tokens) and
        rewards about their groups' means, and how many samples went into them.
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    sampled = [rollout for rollout in rollouts if rollout.finish_reason in ("stop", "length", "turns")]
    if not sampled:
        return {}
    facts = {"share_empty": sum([not rollout.text.strip() for rollout in sampled]) / len(sampled)}
    several = [group for group in groups if len(group.rollouts) > 1]
    if several:
        alike = sum(len({rollout.text for rollout in group.rollouts}) == 1 for group in several)
        facts["share_identical"] = alike / len(several)
    return facts | _surprise(sampled) | _extremes(rollouts) | _products(groups)


def _surprise(rollouts: Sequence[Rollout]) -> Facts:
    """An environment's tokens have the log-prob 0 and are not counted."""
    tokens = sum([rollout.num_written for rollout in rollouts])
    total = sum([sum(segment.logprobs) for rollout in rollouts for segment in rollout.segments])
    return {"surprise": -total / tokens} if tokens else {}


def _extremes(rollouts: Sequence[Rollout]) -> Facts:
    asked: dict[str, int] = {}
    values: dict[str, list[float]] = {}
    for rollout in rollouts:
        for name, value in rollout.rewards.items():
            asked[name] = asked.get(name, 0) + 1
            if value is not None:
                values.setdefault(name, []).append(value)
    facts = {f"asked/{name}": float(count) for name, count in asked.items()}
    for name, found in values.items():
        facts |= {f"low/{name}": min(found), f"high/{name}": max(found)}
    return facts


def _products(groups: Sequence[RolloutGroup]) -> Facts:
    xx = yy = xy = compared = 0.0
    for lengths, rewards in _pairs(groups):
        length, reward = math.fsum(lengths) / len(lengths), math.fsum(rewards) / len(rewards)
        dx, dy = [value - length for value in lengths], [value - reward for value in rewards]
        xx += math.fsum(value * value for value in dx)
        yy += math.fsum(value * value for value in dy)
        xy += math.fsum(a * b for a, b in zip(dx, dy, strict=True))
        compared += len(lengths)
    return {"length_xx": xx, "reward_yy": yy, "length_reward_xy": xy, "compared": compared} if compared else {}


def _pairs(groups: Sequence[RolloutGroup]) -> Iterator[tuple[list[float], list[float]]]:
    """Lengths and rewards of each group that has two different rewards; an equal one says nothing of what is paid."""
    for group in groups:
        known = [(float(r.num_written), r.reward) for r in group.rollouts if r.reward is not None]
        if len({reward for _, reward in known}) > 1:
            yield [length for length, _ in known], [reward for _, reward in known]


def derived(numbers: Mapping[str, float]) -> Facts:
    """What rules read of the metrics in another form.

    Returns:
        `busy`: seconds of sampling and training; evaluations do not count.
        `speed`: tokens, prompts included, per second of these.
        `entropy_or_surprise`: nats, the logged entropy where there is one.
    """
    facts: Facts = {}
    seconds = numbers.get("time/rollout", 0.0) + numbers.get("time/train", 0.0)
    if seconds and numbers.get("num_tokens"):
        facts |= {"busy": seconds, "speed": numbers["num_tokens"] / seconds}
    found = numbers.get("entropy", numbers.get("surprise"))
    if found is not None:
        facts["entropy_or_surprise"] = found
    return facts
