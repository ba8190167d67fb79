"""What the trainer and an algorithm say to each other, and the composition of an algorithm from its parts.

Shapes: `G` rollouts of a group, `K` reward functions, `N` completion tokens of a micro-batch, `R` its rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from groupwise.algorithms.corrections import (
    NO_CORRECTION,
    Correction,
    masked,
    mismatch,
    off_policy_sequence_mask,
    truncated,
    veto_mask,
)
from groupwise.algorithms.entropy import EntropyControl, top_entropy_mask
from groupwise.algorithms.kl import KlEstimator, KlPlace, kl_penalty
from groupwise.algorithms.reduce import Normaliser, token_weights
from groupwise.algorithms.teacher import TeacherCredit
from groupwise.batches import Denominators, Knobs
from groupwise.metrics import Mean, Metric, Metrics
from groupwise.tensors import floats
from groupwise.types import REFERENCE, TEACHER


@dataclass(frozen=True, slots=True)
class AdvantageInputs:
    """The rewards of one training batch, one entry per group; float64 on the CPU.

    Attributes:
        rewards: `[G]`, the weighted sums; NaN where a rollout has no reward.
        components: `[G, K]`, the raw value of each reward function; NaN where it gave none.
        weights: `[K]`, the reward functions' weights.
        lengths: `[G]`, completion tokens.

    Example:
        AdvantageInputs(rewards=(torch.tensor([1.0, 0.0]).double(),), components=(torch.tensor([[1.0],
        [0.0]]).double(),),
                        weights=(1.0,), lengths=(torch.tensor([12.0, 30.0]).double(),))
    """

    rewards: tuple[Tensor, ...]
    components: tuple[Tensor, ...]
    weights: tuple[float, ...]
    lengths: tuple[Tensor, ...]

    def __post_init__(self) -> None:
        assert len(self.rewards) == len(self.components) == len(self.lengths), "every group needs all of its entries"
        for rewards, components, lengths in zip(self.rewards, self.components, self.lengths, strict=True):
            size = rewards.shape[0]
            assert components.shape == (size, len(self.weights)), (
                f"components {tuple(components.shape)} for {size} rollouts"
            )
            assert lengths.shape == (size,), f"lengths {tuple(lengths.shape)} for {size} rollouts"
            assert not torch.isinf(rewards).any(), "a reward is infinite"
            assert not torch.isinf(components).any(), "the value of a reward function is infinite"


@dataclass(frozen=True, slots=True)
class LossInputs:
    """One micro-batch: the completion tokens of its rows, concatenated. Every row is whole.

    Attributes:
        logprobs: `[N]`, float32, of the policy that is trained; requires grad.
        old_logprobs: `[N]`, of the policy at sampling time: the sampler's, or recomputed by the trainer.
        ref_logprobs: `[N]`, of the reference; needed for a KL in the loss.
        entropy: `[N]`, nats; needed (with its gradient for a bonus) when `Algorithm.needs_entropy`.
        advantages: `[N]`.
        mask: `[N]`, 1 where the loss counts, else 0. What stands at a 0 is never read, be it NaN.
        row: `[N]`, int64, the row of each token, 0 to `num_rows - 1`.
        denominators: counted over the whole optimiser batch.
        balance: scalar, the micro-batch's part of the balance loss of a mixture of experts; needed where the algorithm
            weighs it.
        sampler_logprobs: `[N]`, of the sampler, where `old_logprobs` were recomputed; None says that they are the
        sampler's.

    Example:
        LossInputs(logprobs=torch.tensor([-0.1, -0.3], requires_grad=True), old_logprobs=torch.tensor([-0.1, -0.3]),
                   ref_logprobs=None, entropy=None, advantages=torch.ones(2), mask=torch.ones(2), row=torch.tensor([0,
                   0]), num_rows=1, denominators=Denominators(tokens=2, sequences=1, max_tokens=512))
    """

    logprobs: Tensor
    old_logprobs: Tensor
    ref_logprobs: Tensor | None
    entropy: Tensor | None
    advantages: Tensor
    mask: Tensor
    row: Tensor
    num_rows: int
    denominators: Denominators
    sampler_logprobs: Tensor | None = None
    balance: Tensor | None = None

    def __post_init__(self) -> None:
        shape = self.logprobs.shape
        optional = [value for value in (self.ref_logprobs, self.entropy, self.sampler_logprobs) if value is not None]
        for value in (self.old_logprobs, self.advantages, self.mask, self.row, *optional):
            assert value.shape == shape, (
                f"per-token tensors of one micro-batch differ: {tuple(value.shape)}, {tuple(shape)}"
            )


@dataclass(frozen=True, slots=True)
class LossOutput:
    """The micro-batch's part of the loss.

    Attributes:
        loss: scalar; summed over the micro-batches it is the optimiser batch's loss.
        metrics: merge over micro-batches and optimiser steps to the batch's means.
    """

    loss: Tensor
    metrics: Metrics


@dataclass(frozen=True, slots=True)
class TokenLoss:
    """What a policy loss returns, before weights and normaliser.

    Attributes:
        values: `[N]`.
        clipped_low, clipped_high: `[N]` bool, tokens whose ratio a bound stopped; None for a loss without bounds.
    """

    values: Tensor
    clipped_low: Tensor | None = None
    clipped_high: Tensor | None = None


Advantage: TypeAlias = Callable[[AdvantageInputs], tuple[Tensor, ...]]
PolicyLoss: TypeAlias = Callable[[LossInputs], TokenLoss]


@dataclass(frozen=True)
class Algorithm:
    """Advantages from rewards, a loss from log-probs; stateless.

    The loss is Σ_t w_t·(c_t·l_t + kl_coef·KL_t - entropy_coef·H_t) + router_aux_loss_coef·B: l the policy loss, c the
    corrections and the entropy filter, w the normaliser's weights (`groupwise.algorithms.reduce.token_weights`), which
    c does not change, B the balance loss of a mixture of experts.

    Attributes:
        kl_in: with `reward` the KL is taken off the rewards before advantages, and is no part of the loss.
        entropy_control: how `entropy_coef` is to change from step to step; None keeps it.
        masks_truncated: completions cut at the length limit have no loss.
        teacher: credit per token, added to the outcome's.
        needs_reward: a rollout without a reward cannot be learned from.
    """

    name: str
    advantage: Advantage
    policy_loss: PolicyLoss
    normaliser: Normaliser = "token"
    kl_coef: float = 0.0
    kl_in: KlPlace = "loss"
    kl_estimator: KlEstimator = "k3"
    entropy_coef: float = 0.0
    entropy_control: EntropyControl | None = None
    top_entropy_fraction: float = 1.0
    masks_truncated: bool = False
    correction: Correction = NO_CORRECTION
    router_aux_loss_coef: float = 0.0
    teacher: TeacherCredit | None = None
    needs_reward: bool = True

    @property
    def scorers(self) -> tuple[str, ...]:
        """Whose log-probs it asks for before it learns, beside the policy's."""
        named = {REFERENCE: self.kl_in_reward, TEACHER: self.teacher is not None}
        return tuple(name for name, asked in named.items() if asked)

    @property
    def needs_reference(self) -> bool:
        return self.kl_coef > 0

    @property
    def kl_in_loss(self) -> bool:
        return self.kl_coef > 0 and self.kl_in == "loss"

    @property
    def kl_in_reward(self) -> bool:
        return self.kl_coef > 0 and self.kl_in == "reward"

    @property
    def needs_entropy(self) -> bool:
        return self.has_entropy_bonus or self.top_entropy_fraction < 1

    @property
    def has_entropy_bonus(self) -> bool:
        """Now, or in some later step."""
        return self.entropy_coef > 0 or self.entropy_control is not None

    @property
    def learns_without_advantage(self) -> bool:
        """Whether a token whose advantage is zero has a gradient."""
        return self.kl_in_loss or self.has_entropy_bonus or self.router_aux_loss_coef > 0

    @property
    def needs_sampler_logprobs(self) -> bool:
        """Whether `old_logprobs` must be the trainer's own, beside the sampler's, for the settings to act."""
        return self.correction.kind != "none" or self.correction.veto is not None

    def turned(self, knobs: Knobs) -> Algorithm:
        """With the numbers of this step."""
        return self if knobs.entropy_coef is None else replace(self, entropy_coef=knobs.entropy_coef)

    def advantages(self, inputs: AdvantageInputs) -> tuple[Tensor, ...]:
        """`[G]` per group, float64; exactly 0 for a rollout without a reward, which enters no statistic."""
        result = self.advantage(inputs)
        for values, rewards in zip(result, inputs.rewards, strict=True):
            assert values.shape == rewards.shape, (
                f"{self.name}: advantages {tuple(values.shape)} for {tuple(rewards.shape)}"
            )
        return result

    def loss(self, inputs: LossInputs) -> LossOutput:
        """The micro-batch's loss and metrics (`policy_loss`, `kl`, `entropy`, `clip_ratio/*`, `correction/*`)."""
        assert inputs.ref_logprobs is not None or not self.kl_in_loss, f"{self.name}: kl_coef needs ref_logprobs"
        assert inputs.entropy is not None or not self.needs_entropy, f"{self.name}: needs entropy"
        inputs = _without_masked(inputs)
        weights = token_weights(
            self.normaliser, inputs.mask, row=inputs.row, num_rows=inputs.num_rows, denominators=inputs.denominators
        )
        term = self.policy_loss(inputs)
        corrections = self._corrections(inputs)
        policy_loss = torch.sum(weights * corrections * self._entropy_filter(inputs) * term.values)
        sums = _Sums(inputs.mask)
        loss = policy_loss
        if inputs.ref_logprobs is not None:
            kl = kl_penalty(inputs.logprobs, inputs.ref_logprobs, estimator=self.kl_estimator)
            if self.kl_in_loss:
                loss = loss + self.kl_coef * torch.sum(weights * kl)
            sums.add("kl", kl)
        if inputs.entropy is not None:
            if self.entropy_coef > 0:
                assert inputs.entropy.requires_grad or not torch.is_grad_enabled(), (
                    "an entropy bonus needs entropy's gradient"
                )
                loss = loss - self.entropy_coef * torch.sum(weights * inputs.entropy)
            sums.add("entropy", inputs.entropy)
        if term.clipped_low is not None and term.clipped_high is not None:
            sums.add("clip_ratio/low_mean", term.clipped_low)
            sums.add("clip_ratio/high_mean", term.clipped_high)
            sums.add("clip_ratio/region_mean", term.clipped_low | term.clipped_high)
        if self.correction != NO_CORRECTION:
            sums.add("correction/weight_mean", corrections)
            sums.add("correction/dropped", corrections == 0)
        metrics = sums.metrics(policy_loss, inputs.denominators)
        if self.router_aux_loss_coef > 0:
            return with_balance(LossOutput(loss, metrics), inputs, self.router_aux_loss_coef)
        return LossOutput(loss, metrics)

    def _entropy_filter(self, inputs: LossInputs) -> Tensor:
        """`[N]`: 1 for tokens that keep their policy loss."""
        if self.top_entropy_fraction == 1 or inputs.entropy is None:
            return inputs.mask
        return top_entropy_mask(
            inputs.entropy,
            fraction=self.top_entropy_fraction,
            mask=inputs.mask,
            row=inputs.row,
            num_rows=inputs.num_rows,
        )

    def _corrections(self, inputs: LossInputs) -> Tensor:
        """`[N]`, without gradient: weights and masks of the mismatch corrections."""
        mask, row, num_rows, rule = inputs.mask, inputs.row, inputs.num_rows, self.correction
        factors = torch.ones_like(mask)
        sampler = inputs.old_logprobs if inputs.sampler_logprobs is None else inputs.sampler_logprobs
        log_ratio = (inputs.old_logprobs - sampler).detach()
        if rule.kind != "none":
            weights = mismatch(log_ratio, rule.level, mask=mask, row=row, num_rows=num_rows)
            if rule.kind == "truncate":
                weights = truncated(weights, high=rule.high)
            elif rule.kind == "mask":
                weights = masked(weights, low=rule.low, high=rule.high)
            factors = factors * weights
        if rule.veto is not None:
            factors = factors * veto_mask(log_ratio, threshold=rule.veto, mask=mask, row=row, num_rows=num_rows)
        if rule.off_policy_mask is not None:
            drift = (sampler - inputs.logprobs).detach()
            factors = factors * off_policy_sequence_mask(
                drift, inputs.advantages, threshold=rule.off_policy_mask, mask=mask, row=row, num_rows=num_rows
            )
        return factors


def with_balance(output: LossOutput, inputs: LossInputs, coef: float) -> LossOutput:
    """The loss with `coef` times the balance loss, and `aux_loss`, which is the batch's as the parts are merged."""
    assert inputs.balance is not None, "router_aux_loss_coef needs the balance loss"
    share = float(inputs.mask.sum()) / max(inputs.denominators.tokens, 1.0)
    aux = Mean(float(inputs.balance.detach()), share)
    return LossOutput(output.loss + coef * inputs.balance, {**output.metrics, "aux_loss": aux})


class _Sums:
    """Masked sums of metrics, moved to the host together: each `.item()` of its own would stall a GPU."""

    def __init__(self, mask: Tensor) -> None:
        self._mask = mask
        self._names: list[str] = []
        self._totals: list[Tensor] = []

    def add(self, name: str, values: Tensor) -> None:
        self._names.append(name)
        self._totals.append(torch.sum(values.detach().to(torch.float64) * self._mask))

    def metrics(self, policy_loss: Tensor, denominators: Denominators) -> Metrics:
        tokens = self._mask.sum().to(torch.float64)
        numbers = floats(torch.stack([tokens, policy_loss.detach().to(torch.float64), *self._totals]))
        result: dict[str, Metric] = {
            name: Mean(total, numbers[0]) for name, total in zip(self._names, numbers[2:], strict=True)
        }
        # Shares of one optimiser step add up to 1, so micro-batches sum to its loss and several steps average.
        result["policy_loss"] = Mean(numbers[1], numbers[0] / max(denominators.tokens, 1.0))
        return result


def _without_masked(inputs: LossInputs) -> LossInputs:
    """Zeros where the mask is 0: NaN times 0 is NaN, and so is its gradient."""
    keep = inputs.mask > 0

    def clean(values: Tensor) -> Tensor:
        return torch.where(keep, values, torch.zeros_like(values))

    def clean_optional(values: Tensor | None) -> Tensor | None:
        return None if values is None else clean(values)

    return replace(
        inputs,
        logprobs=clean(inputs.logprobs),
        old_logprobs=clean(inputs.old_logprobs),
        ref_logprobs=clean_optional(inputs.ref_logprobs),
        entropy=clean_optional(inputs.entropy),
        advantages=clean(inputs.advantages),
        sampler_logprobs=clean_optional(inputs.sampler_logprobs),
    )
