"""What a training step changes beside the weights: the weight of the entropy bonus, and a reference that follows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from groupwise.algorithms.entropy import EntropyControl
from groupwise.batches import Knobs
from groupwise.metrics import Last, Mean, Metrics, merge
from groupwise.protocols import Policy


class AdaptiveEntropy:
    """The weight of an entropy bonus that follows the entropy that was measured.

    Before anything was measured, it is `coef`.
    """

    def __init__(self, coef: float, control: EntropyControl) -> None:
        self._control = control
        self._coef = coef
        self._entropy = -math.inf

    @property
    def coef(self) -> float:
        """The weight that acts now."""
        return self._control.acting(self._coef, self._entropy)

    def adapt(self, entropy: float) -> None:
        """Take note of the step's mean entropy, in nats."""
        self._coef = self._control.adapt(self._coef, entropy)
        self._entropy = entropy

    def state_dict(self) -> dict[str, Any]:
        return {"coef": self._coef, "entropy": self._entropy}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._coef, self._entropy = float(state["coef"]), float(state["entropy"])


class Following(Protocol):
    """The scorer that a `ReferenceSync` moves, as far as a checkpoint needs it."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True, slots=True)
class ReferenceSync:
    """Every `every` training steps the policy's scorer `name` takes over the part `alpha` of the policy.

    Example:
        ReferenceSync(policy, policy.reference, every=64, alpha=0.6)
    """

    policy: Policy
    reference: Following
    every: int
    alpha: float
    name: str = "reference"


class Upkeep:
    """Both, after each training step. None stands for what stays as it is.

    Example:
        upkeep = Upkeep(entropy=None, sync=ReferenceSync(policy, policy.reference, every=64, alpha=0.6))
        learned = await policy.learn(minibatch, upkeep.knobs)
        metrics = await upkeep.after(step, learned)
    """

    def __init__(self, *, entropy: AdaptiveEntropy | None, sync: ReferenceSync | None) -> None:
        self._entropy = entropy
        self._sync = sync

    @property
    def knobs(self) -> Knobs:
        """The numbers that this step learns with."""
        return Knobs() if self._entropy is None else Knobs(entropy_coef=self._entropy.coef)

    async def after(self, step: int, learned: Sequence[Metrics]) -> Metrics:
        """Do what is due after `step` (from 1), whose micro-batches reported `learned`; the weight that acted."""
        if self._sync is not None and step % self._sync.every == 0:
            await self._sync.policy.move_reference(self._sync.name, self._sync.alpha)
        if self._entropy is None:
            return {}
        acted = self._entropy.coef
        entropy = merge(*learned).get("entropy")
        if isinstance(entropy, Mean) and math.isfinite(entropy.value):
            self._entropy.adapt(entropy.value)
        return {"entropy_coef": Last(acted)}

    def state_dict(self) -> dict[str, Any]:
        return {
            "entropy": None if self._entropy is None else self._entropy.state_dict(),
            "reference": None if self._sync is None else self._sync.reference.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self._entropy is not None:
            self._entropy.load_state_dict(state["entropy"])
        if self._sync is not None:
            self._sync.reference.load_state_dict(state["reference"])
