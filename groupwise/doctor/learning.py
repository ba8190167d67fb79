"""Rules about the policy and the machine: how far it moved, how sure it is, its gradients, its speed."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from groupwise.doctor.history import History
from groupwise.doctor.rules import Seen, mean

_ENTROPY = "entropy_or_surprise"


@dataclass(frozen=True, slots=True)
class KlHigh:
    """The policy is far from its reference."""

    most: float
    steps: int = 3
    name: ClassVar[str] = "kl_high"
    reads: ClassVar[tuple[str, ...]] = ("kl",)
    helps: ClassVar[str] = "a lower optim.lr, a higher algorithm.kl.coef, or an earlier checkpoint"
    told: ClassVar[bool] = False

    def look(self, history: History) -> Iterable[Seen]:
        values = history.last("kl", self.steps)
        if values is not None and mean(values) > self.most:
            yield Seen(
                f"the KL to the reference is {mean(values):.3g} over the last {self.steps} steps, above "
                f"train.doctor.max_kl = {self.most:g}"
            )


@dataclass(frozen=True, slots=True)
class EntropyCollapse:
    """The policy is sure of every token: its samples hardly differ, and nothing new is tried."""

    least: float
    steps: int = 5
    name: ClassVar[str] = "entropy_collapse"
    reads: ClassVar[tuple[str, ...]] = (_ENTROPY,)
    helps: ClassVar[str] = (
        "an entropy bonus (algorithm.entropy.coef), a larger algorithm.loss.clip_high, a lower optim.lr or a higher "
        "rollout.temperature"
    )
    told: ClassVar[bool] = False

    def look(self, history: History) -> Iterable[Seen]:
        values = history.last(_ENTROPY, self.steps)
        if values is not None and mean(values) < self.least:
            yield Seen(
                f"the entropy is {mean(values):.2g} nats per token over the last {self.steps} steps, below "
                f"train.doctor.min_entropy = {self.least:g}"
            )


@dataclass(frozen=True, slots=True)
class EntropyExplosion:
    """The policy is far less sure than it was at the beginning: its texts fall apart."""

    factor: float = 2.0
    least: float = 0.5  # nats more
    steps: int = 5
    name: ClassVar[str] = "entropy_explosion"
    reads: ClassVar[tuple[str, ...]] = (_ENTROPY,)
    helps: ClassVar[str] = (
        "a lower optim.lr, a smaller or no algorithm.entropy.coef, a smaller algorithm.loss.clip_high, or a KL to the "
        "initial model (algorithm.kl.coef)"
    )
    told: ClassVar[bool] = False

    def look(self, history: History) -> Iterable[Seen]:
        values, first = history.last(_ENTROPY, self.steps), history.first(_ENTROPY)
        if values is None or first is None:
            return
        now, before = mean(values), mean(first)
        if now > self.factor * before and now - before > self.least:
            yield Seen(f"the entropy rose from {before:.2g} to {now:.2g} nats per token since the beginning")


@dataclass(frozen=True, slots=True)
class GradientNorm:
    """Gradients many times larger than the run's own, or not finite."""

    factor: float = 10.0
    steps: int = 3
    before: int = 20
    name: ClassVar[str] = "gradient_norm"
    reads: ClassVar[tuple[str, ...]] = ("grad_norm", "updates_skipped")
    helps: ClassVar[str] = (
        "a lower optim.lr, more warm-up (optim.warmup_steps), a smaller optim.max_grad_norm, float32 weights, or "
        "rewards of a smaller scale"
    )
    told: ClassVar[bool] = False

    def look(self, history: History) -> Iterable[Seen]:
        if skipped := history.now("updates_skipped"):
            yield Seen(f"a gradient was not finite, and {skipped:.0f} of a step's updates was left out")
            return
        norms = history.last("grad_norm", self.before + self.steps)
        if norms is None:
            return
        usual, now = statistics.median(norms[: self.before]), min(norms[-self.steps :])
        if usual and now > self.factor * usual:
            yield Seen(
                f"the gradient's norm is above {now:.3g} in the last {self.steps} steps, and was {usual:.3g} in the "
                f"{self.before} before"
            )


@dataclass(frozen=True, slots=True)
class MismatchHigh:
    """The sampler's log-probs are not the trainer's."""

    most: float
    steps: int = 3
    name: ClassVar[str] = "mismatch_high"
    reads: ClassVar[tuple[str, ...]] = ("sampling/sampling_logp_difference/mean",)
    helps: ClassVar[str] = (
        "the built-in engine, whose log-probs are the trainer's; with another one, its sampling settings, weights and "
        "dtype; algorithm.correction limits the harm"
    )
    told: ClassVar[bool] = False

    def look(self, history: History) -> Iterable[Seen]:
        values = history.last("sampling/sampling_logp_difference/mean", self.steps)
        if values is not None and mean(values) > self.most:
            yield Seen(
                f"log-probs of sampler and trainer differ by {mean(values):.2g} nats per token over the last "
                f"{self.steps} steps, above train.doctor.max_mismatch = {self.most:g}"
            )


@dataclass(frozen=True, slots=True)
class ExpertsStrange:
    """Replayed experts are mostly not those that the policy's routers would have chosen."""

    most: float = 0.3
    name: ClassVar[str] = "experts_strange"
    reads: ClassVar[tuple[str, ...]] = ("moe/replaced",)
    helps: ClassVar[str] = (
        "another release of the engine, which names another request's experts or none; rollout.replay_routes = false"
    )
    told: ClassVar[bool] = False

    def look(self, history: History) -> Iterable[Seen]:
        share = history.now("moe/replaced")
        if share is not None and share > self.most:
            yield Seen(f"{share:.0%} of the experts that the engine named are others than the policy's own")


@dataclass(frozen=True, slots=True)
class ThroughputHalved:
    """Tokens per second fell to half, while answers did not become much shorter.

    Attributes:
        seconds: that the newest steps took together; less is a breath, not a speed.
    """

    steps: int = 10
    before: int = 20
    seconds: float = 5.0
    name: ClassVar[str] = "throughput_halved"
    reads: ClassVar[tuple[str, ...]] = ("speed", "busy", "completions/mean_length")
    helps: ClassVar[str] = (
        "see what else uses the machine, whether it throttles or swaps, and in time/* of metrics.jsonl which phase "
        "became slow: sampling, rewards or training"
    )
    told: ClassVar[bool] = False

    def look(self, history: History) -> Iterable[Seen]:
        speeds, busy = history.last("speed", self.before + self.steps), history.last("busy", self.steps)
        if speeds is None or busy is None or sum(busy) < self.seconds:
            return
        usual, now = statistics.median(speeds[: self.before]), statistics.median(speeds[-self.steps :])
        lengths = history.last("completions/mean_length", self.before + self.steps)
        shorter = lengths is not None and mean(lengths[-self.steps :]) < 0.7 * mean(lengths[: self.before])
        if now < usual / 2 and not shorter:
            yield Seen(
                f"{now:,.0f} tokens per second in the last {self.steps} steps, {usual:,.0f} in the {self.before} before"
            )
