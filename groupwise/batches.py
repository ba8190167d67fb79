"""What the trainer gets of rollouts: rows, mini-batches, and the numbers that sums are divided by.

Nothing here imports torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from groupwise.inputs import ModelInput
from groupwise.sides import NO_SIDES, Sides
from groupwise.types import RolloutGroup

if TYPE_CHECKING:
    from groupwise.metrics import Metrics


@dataclass(frozen=True, slots=True)
class TrainingRow:
    """One sequence as the trainer sees it; all per-token arrays are `[T]`, checked here.

    Attributes:
        prompt: `[P]`; neighbours in a micro-batch with one `group` and equal prompts have it computed once.
        follows: `[T]`, what follows the prompt.
        loss_mask: `[T]`, 1 where the loss counts.
        advantages: `[T]`, the credit of each token.
        logprobs: `[T]`, the sampler's log-probs; zeros in supervised training.
        old_logprobs: `[T]`, by the policy before the step's first update; None: the sampler's are these.
        ref_logprobs: `[T]`, by the reference; None: the policy asks it when it needs them.
        sides: of the row: the policy computes it with these, as the sampler did.
    """

    group: int
    prompt: ModelInput
    follows: ModelInput
    loss_mask: tuple[int, ...]
    advantages: tuple[float, ...]
    logprobs: tuple[float, ...]
    old_logprobs: tuple[float, ...] | None = None
    ref_logprobs: tuple[float, ...] | None = None
    sides: Sides = field(default=NO_SIDES, kw_only=True)

    def __post_init__(self) -> None:
        computed = [values for values in (self.old_logprobs, self.ref_logprobs) if values is not None]
        arrays = (self.token_ids, self.loss_mask, self.advantages, self.logprobs, *computed)
        lengths = {len(values) for values in arrays}
        assert len(lengths) == 1, f"per-token arrays of one row differ in length: {sorted(lengths)}"
        assert self.prompt_ids and self.token_ids, "a training row needs at least one prompt and one completion token"

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        """`[P]`."""
        return self.prompt.token_ids

    @property
    def token_ids(self) -> tuple[int, ...]:
        """`[T]`."""
        return self.follows.token_ids

    @property
    def num_tokens(self) -> int:
        return len(self.prompt) + len(self.follows)


@dataclass(frozen=True, slots=True)
class Denominators:
    """What sums are divided by, counted over the whole optimiser batch, so that no split of it changes the gradient.

    Attributes:
        tokens: tokens with `loss_mask = 1`.
        sequences: rows with at least one such token.
        max_tokens: the completion cap, the constant of Dr. GRPO's normaliser.
        expert_counts: `[layers][experts]`, how often the loss tokens chose each expert of a mixture; for a balance loss
            alone, whose policy counts them where they are None.
    """

    tokens: float
    sequences: float
    max_tokens: float
    expert_counts: tuple[tuple[int, ...], ...] | None = None


@dataclass(frozen=True, slots=True)
class MiniBatch:
    """One optimiser step, however it is cut.

    Attributes:
        rows: those that are learned.
        denominators: counted over all rows, those that are only measured included.
        measured: rows whose gradient is known to be zero.
    """

    rows: tuple[TrainingRow, ...]
    denominators: Denominators
    measured: tuple[TrainingRow, ...] = ()


Credit: TypeAlias = float | tuple[float, ...]
"""What a rollout is credited with: one number for all of its tokens, or one for each, `[T]`."""


def mean_credit(credit: Credit) -> float:
    """Over its tokens; 0 without one."""
    return (math.fsum(credit) / max(len(credit), 1)) if isinstance(credit, tuple) else credit


@dataclass(frozen=True, slots=True)
class TrainingBatch:
    """Groups packed for the trainer: `steps_per_batch` mini-batches, each one optimiser step, and again in each further
    pass.

    Attributes:
        groups: the groups it was built from, in index order.
        credit: `[groups][G]`, of one number per rollout or of one per token `[T]`, for trajectories.
        dropped: groups that were sampled for it and teach nothing: measured and recorded, not learned.
    """

    groups: tuple[RolloutGroup, ...]
    credit: tuple[tuple[Credit, ...], ...]
    minibatches: tuple[MiniBatch, ...]
    metrics: Metrics
    dropped: tuple[RolloutGroup, ...] = ()


@dataclass(frozen=True, slots=True)
class Knobs:
    """Numbers that change from step to step, given with each call.

    Attributes:
        entropy_coef: weight of the entropy bonus; None is the objective's own.
    """

    entropy_coef: float | None = None


NO_KNOBS = Knobs()


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """Log-probs asked for: of `follows` `[T]`, after `prompt` `[P]`, computed as `sides` says that they were drawn."""

    prompt: ModelInput
    follows: ModelInput
    sides: Sides = field(default=NO_SIDES, kw_only=True)
