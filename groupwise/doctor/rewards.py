"""Rules about rewards: whether there is anything to learn from, and whether it is what was meant."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from groupwise.doctor.history import History
from groupwise.doctor.rules import Seen, mean, rise
from groupwise.texts import one_line


@dataclass(frozen=True, slots=True)
class NoUsableSample:
    """A step that teaches nothing; `EmptySteps` warns of each."""

    name: ClassVar[str] = "no_usable_sample"
    reads: ClassVar[tuple[str, ...]] = ("empty_steps",)
    helps: ClassVar[str] = "mend what its warning names: the reward, the columns it reads, or the limits on answers"
    told: ClassVar[bool] = True

    def look(self, history: History) -> Iterable[Seen]:
        if history.now("empty_steps"):
            yield Seen("a step had not one usable sample")


@dataclass(frozen=True, slots=True)
class RewardFlat:
    """No rise of the mean reward over `steps` steps that its noise would not give as well."""

    steps: int
    name: ClassVar[str] = "reward_flat"
    reads: ClassVar[tuple[str, ...]] = ("reward",)
    helps: ClassVar[str] = (
        "read samples beside their rewards; if it is at its best, stop or take harder prompts; otherwise a higher "
        "optim.lr, easier prompts, or a reward with steps between nothing and all"
    )
    told: ClassVar[bool] = False

    def look(self, history: History) -> Iterable[Seen]:
        values = history.last("reward", self.steps)
        if values is None:
            return
        gain, error = rise(values)
        if gain < 2 * error or gain <= 0:
            half = self.steps // 2
            yield Seen(
                f"the reward does not rise: mean {mean(values[:half]):.3g} in the first half of the last {self.steps} "
                f"steps, {mean(values[-half:]):.3g} in the second, of which noise alone would give ±{error:.2g}"
            )


@dataclass(frozen=True, slots=True)
class GroupsEqual:
    """Most groups have equal rewards, so they teach nothing."""

    share: float
    steps: int = 5
    name: ClassVar[str] = "groups_equal"
    reads: ClassVar[tuple[str, ...]] = ("frac_reward_zero_std", "reward")
    helps: ClassVar[str] = (
        "prompts that are neither always nor never solved, rollout.dynamic_sampling_cap, a larger rollout.group_size, "
        "or a reward with more steps; where nothing is solved yet, a warm-up by groupwise sft"
    )
    told: ClassVar[bool] = False

    def look(self, history: History) -> Iterable[Seen]:
        shares = history.last("frac_reward_zero_std", self.steps)
        if shares is not None and mean(shares) >= self.share:
            level = history.now("reward")
            at = "" if level is None else f"; the mean reward is {level:.3g}"
            yield Seen(f"in {mean(shares):.0%} of the groups of the last {self.steps} steps all rewards were equal{at}")


@dataclass(frozen=True, slots=True)
class RewardConstant:
    """One reward function says the same of every sample."""

    steps: int = 10
    name: ClassVar[str] = "reward_constant"
    reads: ClassVar[tuple[str, ...]] = ("low/*", "high/*")
    helps: ClassVar[str] = (
        "call the function on a good and a bad answer by hand; one that is always at its best is learned, and can go"
    )
    told: ClassVar[bool] = False

    def look(self, history: History) -> Iterable[Seen]:
        for reward in history.after("low/"):
            lows, highs = history.last(f"low/{reward}", self.steps), history.last(f"high/{reward}", self.steps)
            if lows is not None and highs is not None and min(lows) == max(highs):
                yield Seen(
                    f"reward {one_line(reward)!r} gave {lows[0]:.3g} to every sample of the last {self.steps} steps",
                    about=reward,
                )


@dataclass(frozen=True, slots=True)
class RewardFailed:
    """One reward function fails on a good part of what it is asked."""

    share: float = 0.2
    name: ClassVar[str] = "reward_failed"
    reads: ClassVar[tuple[str, ...]] = ("asked/*", "rewards/*")
    helps: ClassVar[str] = (
        "the warning of its first failure has the cause, and so has each sample in trajectories/; mend the function, "
        "or raise the reward's timeout"
    )
    told: ClassVar[bool] = False

    def look(self, history: History) -> Iterable[Seen]:
        for reward in history.after("asked/"):
            asked, errors = history.now(f"asked/{reward}"), history.now(f"rewards/{reward}/errors")
            if asked and errors and errors >= self.share * asked:
                told = min(errors, asked)
                yield Seen(
                    f"reward {one_line(reward)!r} failed on {told:.0f} of a step's {asked:.0f} samples", about=reward
                )


@dataclass(frozen=True, slots=True)
class RewardIsLength:
    """Within groups, the reward is a matter of length alone.

    Source: the correlation of Pearson, pooled over groups of which each counts about its own mean.
    """

    least: float = 0.9
    steps: int = 10
    samples: int = 64
    name: ClassVar[str] = "reward_is_length"
    reads: ClassVar[tuple[str, ...]] = ("length_xx", "reward_yy", "length_reward_xy", "compared")
    helps: ClassVar[str] = (
        "read the best and the worst sample of some groups: if length is not what should be paid, take it out of the "
        "reward, or raise rollout.max_completion_tokens where long answers lose because they are cut"
    )
    told: ClassVar[bool] = False

    def look(self, history: History) -> Iterable[Seen]:
        sums = [history.last(name, self.steps) for name in self.reads]
        if any(found is None for found in sums):
            return
        xx, yy, xy, compared = (math.fsum(found or ()) for found in sums)
        if compared < self.samples or not xx or not yy:
            return
        correlation = xy / math.sqrt(xx * yy)
        if abs(correlation) >= self.least:
            paid = "longer" if correlation > 0 else "shorter"
            yield Seen(
                f"within a group the {paid} answer earns more, and little else counts: correlation of reward and "
                f"length {correlation:.2f} over the last {self.steps} steps"
            )


@dataclass(frozen=True, slots=True)
class AccuracyFalls:
    """Held-out accuracy is lower than it was, by more than chance, although the reward is higher.

    Args:
        rows: of an evaluation; decides what chance would give.
    """

    rows: int
    name: ClassVar[str] = "accuracy_falls"
    reads: ClassVar[tuple[str, ...]] = ("eval/accuracy", "reward", "reward_at_eval")
    helps: ClassVar[str] = (
        "the reward is gamed or the training prompts are learned by heart: read samples with high rewards, compare the "
        "rewards of training and evaluation, and take the model of the best evaluation (train.keep_best)"
    )
    told: ClassVar[bool] = False

    def look(self, history: History) -> Iterable[Seen]:
        if history.now("eval/accuracy") is None:
            return
        accuracies, rewards = history.known("eval/accuracy"), history.known("reward_at_eval")
        count = min(len(accuracies), len(rewards))
        if count < 2:
            return
        accuracies, rewards = accuracies[-count:], rewards[-count:]
        best = max(range(count), key=lambda index: accuracies[index])
        chance = 2 * math.sqrt(sum(p * (1 - p) for p in (accuracies[best], accuracies[-1])) / max(self.rows, 1))
        if accuracies[best] - accuracies[-1] > chance and rewards[-1] > rewards[best]:
            yield Seen(
                f"held-out accuracy fell from {accuracies[best]:.1%} to {accuracies[-1]:.1%} while the reward rose "
                f"from {rewards[best]:.3g} to {rewards[-1]:.3g}"
            )
