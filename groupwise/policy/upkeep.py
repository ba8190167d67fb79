"""What a training step changes beside the weights: the weight of the entropy bonus, and a reference that follows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from groupwise.algorithms.base import Algorithm, LossInputs, LossOutput
from groupwise.algorithms.entropy import EntropyControl
from groupwise.metrics import Last, Mean, Metrics, merge
from groupwise.policy.reference import Reference


class AdaptiveEntropy:
    """An algorithm whose entropy bonus follows the entropy that was measured; an `Objective`.

    Before anything was measured, the bonus acts with the algorithm's own `entropy_coef`.
    """

    def __init__(self, algorithm: Algorithm, control: EntropyControl) -> None:
        self._algorithm = algorithm
        self._control = control
        self._coef = algorithm.entropy_coef
        self._entropy = -math.inf

    @property
    def needs_reference(self) -> bool:
        return self._algorithm.needs_reference

    @property
    def needs_entropy(self) -> bool:
        return True

    @property
    def router_aux_loss_coef(self) -> float:
        return self._algorithm.router_aux_loss_coef

    @property
    def coef(self) -> float:
        """The weight that acts now."""
        return self._control.acting(self._coef, self._entropy)

    def loss(self, inputs: LossInputs) -> LossOutput:
        return replace(self._algorithm, entropy_coef=self.coef).loss(inputs)

    def adapt(self, entropy: float) -> None:
        """Take note of the step's mean entropy, in nats."""
        self._coef = self._control.adapt(self._coef, entropy)
        self._entropy = entropy

    def state_dict(self) -> dict[str, Any]:
        return {"coef": self._coef, "entropy": self._entropy}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._coef, self._entropy = float(state["coef"]), float(state["entropy"])


@dataclass(frozen=True, slots=True)
class ReferenceSync:
    """Every `every` training steps the reference takes over the part `alpha` of the policy.

    Example:
        ReferenceSync(policy.reference, every=64, alpha=0.6)
    """

    reference: Reference
    every: int
    alpha: float


class Upkeep:
    """Both, after each training step. None stands for what stays as it is.

    Example:
        upkeep = Upkeep(entropy=None, sync=ReferenceSync(policy.reference, every=64, alpha=0.6))
        metrics = upkeep.after(step, learned)
    """

    def __init__(self, *, entropy: AdaptiveEntropy | None, sync: ReferenceSync | None) -> None:
        self._entropy = entropy
        self._sync = sync

    def after(self, step: int, learned: Sequence[Metrics]) -> Metrics:
        """Do what is due after `step` (from 1), whose micro-batches reported `learned`; the weight that acted."""
        if self._sync is not None and step % self._sync.every == 0:
            self._sync.reference.sync(self._sync.alpha)
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
