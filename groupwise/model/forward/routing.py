"""Routers of mixtures of experts: the same choices for a token in any company, and a record of what was chosen.

Shapes: N packed tokens, of which those with a loss count; E experts of a layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from groupwise.metrics import Load, Metric
from groupwise.model.fast_cpu.evenly import evenly
from groupwise.model.fast_cpu.linear import dnn_linear
from groupwise.model.forward.packing import Packed

ExpertCounts = tuple[tuple[int, ...], ...]
"""`[layers][E]`, how often each expert was chosen."""


@dataclass(slots=True)
class Routing:
    """What the routers chose in one pass, for the tokens that have a loss.

    Attributes:
        weights: `[N]` int64, how many loss tokens each packed token predicts; a shared prompt's last one predicts
            the first token of all its completions.
        keeps_logits: for the balance loss.
        counts: `[E]` int64 by the layer's experts module, in the order of layers.
        logits: `[N, E]` by the layer's router, in the order of layers.

    Example:
        routing = Routing.of(packed, mask)
        with routing.recording():
            packed_hidden_states(model, packed)
        routing.expert_counts
    """

    weights: Tensor
    keeps_logits: bool = False
    counts: dict[nn.Module, Tensor] = field(default_factory=dict)
    logits: dict[nn.Module, Tensor] = field(default_factory=dict)

    @staticmethod
    def of(packed: Packed, mask: Tensor, *, keeps_logits: bool = False) -> Routing:
        """For the predicted tokens `[M]` whose `mask` is not 0."""
        weights = packed.predictors.new_zeros(packed.token_ids.shape[0])
        return Routing(weights.index_add_(0, packed.predictors, (mask > 0).to(weights.dtype)), keeps_logits)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Passes of this thread inside are recorded. What a backward pass computes again is not, as it comes after."""
        token = _RECORD.set(self)
        try:
            yield
        finally:
            _RECORD.reset(token)

    @property
    def expert_counts(self) -> ExpertCounts:
        return tuple(tuple(counts.tolist()) for counts in self.counts.values())

    def balance(self, counts: ExpertCounts, tokens: float) -> Tensor:
        """This pass's part of the balance loss of the whole optimiser batch; parts add up to it, however it is split.

        Mean over layers of E · Σ_e F_e · Σ_t p_e(t) / N² (Fedus et al. 2021, "Switch Transformers", equations 4 to 6):
        F_e the times that expert e was chosen, p_e(t) the router's softmax, N loss tokens. F and N are the batch's.

        Args:
            counts: F; tokens: N.
        """
        assert len(self.logits) == len(counts), f"{len(self.logits)} routers for counts of {len(counts)} layers"
        weights = self.weights.to(torch.float32)
        total = weights.new_zeros(())
        for logits, chosen in zip(self.logits.values(), counts, strict=True):
            shares = weights @ logits.float().softmax(-1)
            loads = torch.tensor(chosen, dtype=torch.float32, device=shares.device)
            total = total + len(chosen) * (loads * shares).sum()
        return total / (len(counts) * max(tokens, 1.0) ** 2)

    def metrics(self) -> dict[str, Metric]:
        """`moe/max_load`, `moe/dead`, `moe/entropy` over the tokens that have a loss."""
        counts = self.expert_counts
        return {
            "moe/max_load": Load(counts, "max_load"),
            "moe/dead": Load(counts, "dead"),
            "moe/entropy": Load(counts, "entropy"),
        }


_RECORD: ContextVar[Routing | None] = ContextVar("routing", default=None)


def sum_counts(parts: Sequence[ExpertCounts]) -> ExpertCounts:
    """Layer by layer and expert by expert."""
    return tuple(tuple(map(sum, zip(*layer, strict=True))) for layer in zip(*parts, strict=True))


@torch.no_grad()
def note_choices(experts: nn.Module, chosen: Tensor) -> None:
    """Count `chosen [N, k]` of a layer if this pass is recorded."""
    record = _RECORD.get()
    if record is None:
        return
    counts = record.weights.new_zeros(cast(Any, experts).num_experts)
    counts.index_add_(0, chosen.flatten(), record.weights.repeat_interleave(chosen.shape[1]))
    seen = record.counts.get(experts)
    record.counts[experts] = counts if seen is None else seen + counts


class _Even(TorchFunctionMode):
    """Inside, linear functions and sigmoids are those that give a row the same bits in any company."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _SIGMOIDS:
            return evenly(torch.sigmoid, args[0])
        if func is nn.functional.linear and args[0].dtype == torch.float32 and args[0].device.type == "cpu":
            return dnn_linear(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


_SIGMOIDS = (torch.sigmoid, torch.Tensor.sigmoid, nn.functional.sigmoid)


class EvenRouter(nn.Module):
    """Laid over a router, whose class calls functions of torch on its weight."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        with _Even():
            routed = super().forward(hidden_states, *args, **kwargs)  # pyright: ignore
        record = _RECORD.get()
        if record is not None and record.keeps_logits:
            record.logits[self] = routed[0]
        return routed


class EvenSharedExpert(nn.Module):
    """Laid over a block of Qwen2-MoE, whose shared expert has a gate of its own: a sigmoid of one number per token."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        parts = cast(Any, self)
        rows = hidden_states.flatten(0, -2)
        _, weights, chosen = parts.gate(rows)
        share = evenly(torch.sigmoid, parts.shared_expert_gate(rows))
        return (parts.experts(rows, chosen, weights) + share * parts.shared_expert(rows)).view_as(hidden_states)
