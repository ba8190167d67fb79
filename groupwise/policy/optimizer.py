"""The optimiser over float32 master weights.

A bfloat16 weight of 0.02 cannot register an update of 1e-6, so weights that compute in bfloat16 have a float32 master
each: gradients are added up in float32, the master is updated, and the weight becomes the rounded master, in place.
Weights in float32 are their own masters.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from groupwise.config import OptimConfig
from groupwise.policy.update_rules import Rule, make_rules


@dataclass(frozen=True, slots=True)
class Gradient:
    """One parameter's gradient. `norm` is over the finite entries, the Euclidean one; `num_bad` counts the others."""

    norm: float
    num_bad: int


class MasterOptimizer:
    """The update rule that `optim.name` names, on the masters of a module's trainable parameters.

    Args:
        module: its parameters that require gradients are trained; each tensor once, however many names it has.
        ends: of them, the embedding and the head, which Muon leaves to AdamW.

    Raises:
        ConfigError: a pattern of `optim.weight_decay_groups` matches no parameter.
    """

    def __init__(self, module: nn.Module, config: OptimConfig, *, ends: Collection[Tensor] = ()) -> None:
        self._weights = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self._masters = {name: _master_of(p) for name, p in self._weights.items()}
        self._hooks: list[Any] = [
            cast(Any, weight).register_post_accumulate_grad_hook(self._collect(self._masters[name]))
            for name, weight in self._weights.items()
            if self._masters[name] is not weight
        ]
        at_ends = {name for name, weight in self._weights.items() if any(weight is end for end in ends)}
        self._rules: list[Rule] = make_rules(self._masters, config, ends=at_ends)

    @staticmethod
    def _collect(master: Tensor) -> Any:
        def add(weight: Tensor) -> None:
            assert weight.grad is not None
            _add(weight.grad, master)
            weight.grad = None

        return add

    def gradients_of(self, loss: Tensor) -> tuple[Tensor | None, ...]:
        """Of each weight, and not added up yet: `add` takes them. `loss.backward()` does both."""
        return torch.autograd.grad(loss, list(self._weights.values()), allow_unused=True)

    def add(self, gradients: Sequence[Tensor | None]) -> None:
        """Add the gradients of one loss, as `gradients_of` gives them."""
        for master, gradient in zip(self._masters.values(), gradients, strict=True):
            if gradient is not None:
                _add(gradient, master)

    @property
    def bytes_to_come(self) -> int:
        """Memory that the first update takes beyond what is held before it: gradients in float32, and moments."""
        gradients = 4 * sum(master.numel() for master in self._masters.values())
        return gradients + sum(rule.state_bytes for rule in self._rules)

    def clip(self, max_norm: float) -> float:
        """Scale all gradients down to `max_norm` together (0, or a norm that is not finite: leave them); returns the
        norm that they had."""
        grads = [m.grad for m in self._masters.values() if m.grad is not None]
        if not grads:
            return 0.0
        norm = torch.nn.utils.get_total_norm(grads)
        found = float(norm)
        if max_norm > 0 and math.isfinite(found):
            torch.nn.utils.clip_grads_with_norm_(self._masters.values(), max_norm, norm)
        return found

    def gradients(self) -> dict[str, Gradient]:
        """Of every parameter that has one."""
        return {name: _describe(m.grad) for name, m in self._masters.items() if m.grad is not None}

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Update the masters at this rate, round them into the weights, forget the gradients."""
        for master in self._masters.values():
            if master.grad is None:  # so that an update in which nothing was learned is an update for all parameters
                master.grad = torch.zeros_like(master)
        for rule in self._rules:
            for group in rule.optimizer.param_groups:
                group["lr"] = lr
            rule.optimizer.step()
        for name, weight in self._weights.items():
            if self._masters[name] is not weight:
                weight.copy_(self._masters[name])
        self.forget_gradients()

    def forget_gradients(self) -> None:
        for master in self._masters.values():
            master.grad = None

    def release(self) -> None:
        """Let go of the module: its gradients stay its own from now on."""
        self.forget_gradients()
        for hook in self._hooks:
            hook.remove()

    def masters(self) -> dict[str, Tensor]:
        return {name: master.detach() for name, master in self._masters.items()}

    @torch.no_grad()
    def set_masters(self, values: Mapping[str, Tensor]) -> None:
        """Put these into the masters, and rounded into the weights."""
        for name, weight in self._weights.items():
            self._masters[name].copy_(values[name])
            weight.copy_(self._masters[name])

    def state_dict(self) -> dict[str, Any]:
        """Masters and moments by parameter name."""
        moments = {
            name: dict(rule.optimizer.state[self._masters[name]])
            for rule in self._rules
            for name in rule.names
            if self._masters[name] in rule.optimizer.state
        }
        return {"masters": self.masters(), "moments": moments}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.set_masters(state["masters"])
        for rule in self._rules:
            for name in rule.names:
                if name in state["moments"]:
                    master = self._masters[name]
                    rule.optimizer.state[master] = {
                        key: value.to(master.device, copy=True) if isinstance(value, Tensor) else value
                        for key, value in state["moments"][name].items()
                    }


def _add(gradient: Tensor, master: Tensor) -> None:
    wide = gradient.to(master.dtype)
    master.grad = wide if master.grad is None else master.grad.add_(wide)


def _describe(grad: Tensor) -> Gradient:
    finite = grad.isfinite()
    kept: Any = grad.where(finite, 0.0)
    return Gradient(float(kept.norm()), int((~finite).sum()))


def _master_of(weight: nn.Parameter) -> Tensor:
    if weight.dtype in (torch.float32, torch.float64):
        return weight
    return weight.detach().float().clone().requires_grad_()
