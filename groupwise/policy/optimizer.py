"""The optimiser over float32 master weights.

A bfloat16 weight of 0.02 cannot register an update of 1e-6, so weights that compute in bfloat16 have a float32 master
each: gradients are added up in float32, the master is updated, and the weight becomes the rounded master, in place.
Weights in float32 are their own masters.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from groupwise.config import OptimConfig


class MasterOptimizer:
    """AdamW (Loshchilov & Hutter 2019, algorithm 2) on the masters of a module's trainable parameters.

    Args:
        module: its parameters that require gradients are trained; each tensor once, however many names it has.
    """

    def __init__(self, module: nn.Module, config: OptimConfig) -> None:
        self._weights = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self._masters = {name: _master_of(p) for name, p in self._weights.items()}
        for name, weight in self._weights.items():
            if self._masters[name] is not weight:
                weight.register_post_accumulate_grad_hook(self._collect(self._masters[name]))
        decayed = [m for name, m in self._masters.items() if _is_decayed(name, m)]
        plain = [m for name, m in self._masters.items() if not _is_decayed(name, m)]
        self._adam = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}],
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            fused=True,
        )

    @staticmethod
    def _collect(master: Tensor) -> Any:
        def add(weight: Tensor) -> None:
            assert weight.grad is not None
            grad = weight.grad.float()
            master.grad = grad if master.grad is None else master.grad.add_(grad)
            weight.grad = None

        return add

    @property
    def bytes_to_come(self) -> int:
        """Memory that the first update takes beyond what is held before it: gradients and both moments, float32."""
        return 12 * sum(master.numel() for master in self._masters.values())

    def clip(self, max_norm: float) -> float:
        """Scale all gradients down to `max_norm` together (0: leave them); returns the norm that they had."""
        grads = [m.grad for m in self._masters.values() if m.grad is not None]
        if not grads:
            return 0.0
        norm = torch.nn.utils.get_total_norm(grads)
        if max_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(self._masters.values(), max_norm, norm)
        return float(norm)

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Update the masters at this rate, round them into the weights, forget the gradients."""
        for group in self._adam.param_groups:
            group["lr"] = lr
        for master in self._masters.values():
            if master.grad is None:  # so that an update in which nothing was learned is an update for all parameters
                master.grad = torch.zeros_like(master)
        self._adam.step()
        for name, weight in self._weights.items():
            if self._masters[name] is not weight:
                weight.copy_(self._masters[name])
        self.forget_gradients()

    def forget_gradients(self) -> None:
        for master in self._masters.values():
            master.grad = None

    def state_dict(self) -> dict[str, Any]:
        """Masters and moments by parameter name."""
        moments = {
            name: dict(self._adam.state[master]) for name, master in self._masters.items() if master in self._adam.state
        }
        return {"masters": {name: m.detach() for name, m in self._masters.items()}, "moments": moments}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, weight in self._weights.items():
            master = self._masters[name]
            master.copy_(state["masters"][name])
            weight.copy_(master)
            if name in state["moments"]:
                self._adam.state[master] = {
                    key: value.to(master.device if key != "step" else value.device, copy=True)
                    for key, value in state["moments"][name].items()
                }


def _master_of(weight: nn.Parameter) -> Tensor:
    if weight.dtype in (torch.float32, torch.float64):
        return weight
    return weight.detach().float().clone().requires_grad_()


def _is_decayed(name: str, weight: Tensor) -> bool:
    return weight.dim() >= 2 and not name.endswith("bias")
