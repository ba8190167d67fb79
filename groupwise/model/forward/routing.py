"""Routers of mixtures of experts: the same choices for a token in any company, and a record of what was chosen.

Shapes: N packed tokens, of which those with a loss count; E experts of a layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from groupwise.metrics import Load, Mean, Metric
from groupwise.model.fast_cpu.evenly import evenly
from groupwise.model.fast_cpu.linear import dnn_linear
from groupwise.model.forward.packing import Packed
from groupwise.model.forward.replay import Forced, forced_for, replay_of_pass

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
        replaced: `[N]` int64 by layer, where the sampler's choices are replayed: how many of a token's are others than
            the router's own.

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
    replaced: list[Tensor] = field(default_factory=list[Tensor])
    choices: int = 0

    @staticmethod
    def of(packed: Packed, mask: Tensor, *, keeps_logits: bool = False) -> Routing:
        """For the predicted tokens `[M]` whose `mask` is not 0."""
        weights = packed.predictors.new_zeros(packed.token_ids.shape[0])
        return Routing(weights.index_add_(0, packed.predictors, (mask > 0).to(weights.dtype)), keeps_logits)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Passes of this thread inside are recorded. What a backward pass computes again is not, as it comes after."""
        with _recorded_by(self):
            yield
        if (replay := replay_of_pass()) is not None:
            self.replaced = [noted for one in replay.forced.values() for noted in one.replaced]
            self.choices = sum(one.ids.shape[1] for one in replay.forced.values())

    def note(self, experts: nn.Module, chosen: Tensor) -> None:
        """Count `chosen [N, k]` of a layer."""
        counts = self.weights.new_zeros(cast(Any, experts).num_experts)
        counts.index_add_(0, chosen.flatten(), self.weights.repeat_interleave(chosen.shape[1]))
        seen = self.counts.get(experts)
        self.counts[experts] = counts if seen is None else seen + counts

    def note_logits(self, router: nn.Module, logits: Tensor) -> None:
        """For the balance loss."""
        if self.keeps_logits:
            self.logits[router] = logits

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
        """`moe/max_load`, `moe/dead`, `moe/entropy` over the tokens that have a loss; and `moe/replaced`, where the
        sampler's choices are replayed: the share of them that the router would not have made."""
        counts = self.expert_counts
        found: dict[str, Metric] = {
            "moe/max_load": Load(counts, "max_load"),
            "moe/dead": Load(counts, "dead"),
            "moe/entropy": Load(counts, "entropy"),
        }
        if self.replaced:
            replaced = float((self.weights * self.replaced_of_tokens()).sum())
            found["moe/replaced"] = Mean(replaced, float(self.weights.sum()) * self.choices)
        return found

    def replaced_of_tokens(self) -> Tensor:
        """`[N]` int64, over all layers."""
        return torch.stack(self.replaced).sum(0)


class Record(Protocol):
    """Takes note of what routers choose in a pass."""

    def note(self, experts: nn.Module, chosen: Tensor) -> None:
        """Of `chosen [N, k]` of a layer."""
        ...

    def note_logits(self, router: nn.Module, logits: Tensor) -> None:
        """Of `logits [N, E]` of a layer."""
        ...


@dataclass(slots=True)
class Choices:
    """The experts that each token of one pass got, as a sampler tells them.

    Attributes:
        chosen: `[N, k]` by layer.
        experts: E.
    """

    chosen: list[Tensor] = field(default_factory=list[Tensor])
    experts: int = 0

    def recording(self) -> AbstractContextManager[None]:
        """Passes of this thread inside are recorded."""
        return _recorded_by(self)

    def note(self, experts: nn.Module, chosen: Tensor) -> None:
        self.chosen.append(chosen)
        self.experts = cast(Any, experts).num_experts

    def note_logits(self, router: nn.Module, logits: Tensor) -> None:
        """Nobody asks for them."""


_RECORD: ContextVar[Record | None] = ContextVar("routing", default=None)


@contextmanager
def _recorded_by(record: Record) -> Iterator[None]:
    token = _RECORD.set(record)
    try:
        yield
    finally:
        _RECORD.reset(token)


def sum_counts(parts: Sequence[ExpertCounts]) -> ExpertCounts:
    """Layer by layer and expert by expert."""
    return tuple(tuple(map(sum, zip(*layer, strict=True))) for layer in zip(*parts, strict=True))


@torch.no_grad()
def note_choices(experts: nn.Module, chosen: Tensor) -> None:
    """Count `chosen [N, k]` of a layer if this pass is recorded."""
    record = _RECORD.get()
    if record is not None:
        record.note(experts, chosen)


class _Even(TorchFunctionMode):
    """Inside, linear functions and sigmoids are those that give a row the same bits in any company.

    Args:
        forced: whose experts stand for the k largest, of `experts`.
    """

    def __init__(self, forced: Forced | None = None, experts: int = 0) -> None:
        super().__init__()
        self._forced, self._experts = forced, experts

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _SIGMOIDS:
            return evenly(torch.sigmoid, args[0])
        if func is nn.functional.linear and args[0].dtype == torch.float32 and args[0].device.type == "cpu":
            return dnn_linear(*args, **(kwargs or {}))
        if self._forced is not None and func in _LARGEST:
            k = args[1] if len(args) > 1 else (kwargs or {})["k"]
            if self._forced.asks(args[0], k, self._experts):
                return self._forced.largest(args[0], func(*args, **(kwargs or {}))[1])
        return func(*args, **(kwargs or {}))


_SIGMOIDS = (torch.sigmoid, torch.Tensor.sigmoid, nn.functional.sigmoid)
_LARGEST = (torch.topk, torch.Tensor.topk)


class EvenRouter(nn.Module):
    """Laid over a router, whose class calls functions of torch on its weight."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        forced = forced_for(self)
        with _Even(forced, 0 if forced is None else cast(Any, self).num_experts):
            routed = super().forward(hidden_states, *args, **kwargs)  # pyright: ignore
        record = _RECORD.get()
        if record is not None:
            record.note_logits(self, routed[0])
        return routed


def routers_of(model: nn.Module) -> list[nn.Module]:
    """Those of `EvenRouter`, layer after layer."""
    return [module for module in model.modules() if isinstance(module, EvenRouter)]


class EvenSharedExpert(nn.Module):
    """Laid over a block of Qwen2-MoE, whose shared expert has a gate of its own: a sigmoid of one number per token."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        parts = cast(Any, self)
        rows = hidden_states.flatten(0, -2)
        _, weights, chosen = parts.gate(rows)
        share = evenly(torch.sigmoid, parts.shared_expert_gate(rows))
        return (parts.experts(rows, chosen, weights) + share * parts.shared_expert(rows)).view_as(hidden_states)
