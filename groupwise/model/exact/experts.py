"""Mixtures of experts whose rows have the same bits in any company.

An expert gets the rows of the tokens that chose it, often one to three, and a product of so few takes other kernels
than one of many (measured in float32: up to half of all log-probs of a batch of one differ from those of a batch of
64). Here each expert's rows are padded with zeros to full tiles, multiplied, and gathered back; a token's results are
added in the order of its choices. No step writes to one place twice, so that a GPU needs no atomics.

Up to a depth of 256 torch's grouped product is taken in float32, and beyond oneDNN's, expert by expert: torch's
library for float32 shares out deeper sums among threads, in ways that depend on the number of rows (measured from a
depth of 384 on; never up to 256, for 1 to 64 threads).

Shapes: N tokens that choose k of E experts each, S = N k pairs of both, P padded rows, hidden states `[N, H]`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import grouped_mm, pad
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from groupwise.errors import ConfigError
from groupwise.model.fast_cpu.lean_layers import gated, is_silu, lay
from groupwise.model.fast_cpu.linear import dnn_linear
from groupwise.model.forward.packing import ROW_MULTIPLE, round_up
from groupwise.model.forward.routing import EvenRouter, EvenSharedExpert, note_choices

EXPERTS_NAME = "groupwise"
_GROUPED_DEPTH = 256


@dataclass(frozen=True, slots=True)
class Places:
    """Where pairs of token and expert stand: expert after expert, each with its rows padded to full tiles.

    Attributes:
        row_of_pair: `[S]`; the pairs of a token are neighbours.
        pair_of_row: `[P]`, with S where there is only padding; token_of_row: `[P]`, with N there.
        ends: `[E]` int32, the row behind each expert's last. On a GPU rows may follow that belong to none.

    Example:
        Places.of(torch.tensor([[1, 0], [1, 2]]), 3).ends == torch.tensor([16, 32, 48])
    """

    row_of_pair: Tensor
    pair_of_row: Tensor
    token_of_row: Tensor
    ends: Tensor

    @staticmethod
    def of(chosen: Tensor, experts: int) -> Places:
        """For `chosen [N, k]`, the experts of each token."""
        pairs, device = chosen.numel(), chosen.device
        by_expert, order = chosen.flatten().sort(stable=True)
        ends = torch.searchsorted(by_expert, torch.arange(experts, device=device), right=True)
        counts = ends.diff(prepend=ends.new_zeros(1))
        padded = (counts + (ROW_MULTIPLE - 1)) // ROW_MULTIPLE * ROW_MULTIPLE
        padded_ends = padded.cumsum(0)
        rows = (padded_ends - padded - ends + counts)[by_expert] + torch.arange(pairs, device=device)
        # To know how many there are, a GPU would have to be waited for; as many as there can be are taken instead.
        if device.type == "cpu":
            count = int(padded_ends[-1])
        else:
            count = round_up(pairs, ROW_MULTIPLE) + ROW_MULTIPLE * min(experts, pairs)
        row_of_pair = torch.empty_like(rows)
        row_of_pair[order] = rows
        pair_of_row = rows.new_full((count,), pairs)
        pair_of_row[rows] = order
        return Places(row_of_pair, pair_of_row, pair_of_row // chosen.shape[1], padded_ends.to(torch.int32))


class _Spread(torch.autograd.Function):
    """From hidden states `[N, H]` to the experts' rows `[P, H]`; zeros where there is only padding."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Places) -> Tensor:
        ctx.places, ctx.tokens = places, x.shape[0]
        return pad(x, (0, 0, 0, 1)).index_select(0, places.token_of_row)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].index_select(0, ctx.places.row_of_pair).unflatten(0, (ctx.tokens, -1)).sum(1), None


class _Gather(torch.autograd.Function):
    """From the experts' results `[P, H]` to their weighted sums `[N, H]`, added in the order of choices."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, places: Places) -> Tensor:
        ctx.save_for_backward(rows, weights)
        ctx.places = places
        results = rows.index_select(0, places.row_of_pair).unflatten(0, weights.shape)
        return (results * weights[..., None]).sum(1).to(rows.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        (rows, weights), places, grad = ctx.saved_tensors, ctx.places, grads[0]
        of_weights = None
        if ctx.needs_input_grad[1]:
            results = rows.index_select(0, places.row_of_pair).unflatten(0, weights.shape)
            of_weights = (results * grad[:, None]).sum(-1).to(weights.dtype)
        factors = pad(weights.flatten(), (0, 1)).index_select(0, places.pair_of_row)
        of_rows = pad(grad, (0, 0, 0, 1)).index_select(0, places.token_of_row) * factors[:, None]
        return of_rows.to(rows.dtype), of_weights, None


class _DnnProduct(torch.autograd.Function):
    """Each expert's rows times its weight, by oneDNN; only the forward must be exact."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weight)
        ctx.ends = ends
        return _each(rows, weight, ends, dnn_linear)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (rows, weight), ends, grad = ctx.saved_tensors, ctx.ends, grads[0].contiguous()
        of_rows = grouped_mm(grad, weight, offs=ends) if ctx.needs_input_grad[0] else None
        of_weight = grouped_mm(grad.t(), rows, offs=ends) if ctx.needs_input_grad[1] else None
        return of_rows, of_weight, None


def _each(rows: Tensor, weight: Tensor, ends: Tensor, product: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """`[P, O]`, one product for each expert that has rows."""
    stops = ends.tolist()
    parts = [
        product(rows[start:stop], one)
        for start, stop, one in zip([0, *stops], stops, weight.unbind(0), strict=False)
        if stop > start
    ]
    return torch.cat([*parts, rows.new_zeros(rows.shape[0] - stops[-1], weight.shape[1])])


def expert_product(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """`[P, O]` from `rows [P, I]` and `weight [E, O, I]`: rows up to `ends[0]` times the first weight, and so on."""
    by_dnn = rows.device.type == "cpu" and rows.dtype == torch.float32
    # The grouped product is there for these types alone, and for rows that begin at multiples of 16 bytes.
    aligned = all(size * rows.element_size() % 16 == 0 for size in weight.shape[1:])
    if aligned and by_dnn and rows.shape[1] > _GROUPED_DEPTH:
        return _DnnProduct.apply(rows, weight, ends)
    if aligned and (by_dnn or rows.dtype == torch.bfloat16):
        return grouped_mm(rows, weight.transpose(1, 2), offs=ends)
    return _each(rows, weight, ends, dnn_linear if by_dnn else nn.functional.linear)


def even_experts(module: Any, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """The function registered with transformers, in place of the forward of an experts module.

    Args:
        hidden: `[N, H]`; chosen, weights: `[N, k]`, the experts of each token and their shares.
    """
    note_choices(module, chosen)
    places = Places.of(chosen, module.num_experts)
    inner = expert_product(_Spread.apply(hidden, places), _weight(module, module.gate_up_proj), places.ends)
    gate, up = inner.chunk(2, dim=-1)
    inner = gated(module.act_fn, gate, up) if is_silu(module.act_fn) else module.act_fn(gate) * up
    rows = expert_product(inner, _weight(module, module.down_proj), places.ends)
    return _Gather.apply(rows, weights, places)


def _weight(module: Any, weight: Tensor) -> Tensor:
    """`[E, O, I]`."""
    return weight.transpose(1, 2) if module.is_transposed else weight


def experts_of(model: nn.Module) -> list[nn.Module]:
    """The experts modules whose function can be chosen, layer after layer; none in a dense model."""
    return [module for module in model.modules() if _can_switch(module)]


def make_experts_even(model: PreTrainedModel) -> None:
    """Let the experts of `model` compute by `even_experts`, and its routers evenly; a dense model stays as it is.

    Raises:
        ConfigError: it has experts that this cannot be done for, or that are chosen by chance.
    """
    _refuse_strangers(model)
    experts = experts_of(model)
    if not experts:
        return
    _refuse_chance(model)
    model.set_experts_implementation(EXPERTS_NAME)
    for block in model.modules():
        if not any(child in experts for child in block.children()):
            continue
        if type(block).__name__ == "Qwen2MoeSparseMoeBlock":
            lay(EvenSharedExpert, block)
        for child in block.children():
            if re.search("(Router|Gate|Gating)$", type(child).__name__) and not isinstance(child, EvenRouter):
                lay(EvenRouter, child)


def check_balance_loss(model: PreTrainedModel, coef: float) -> None:
    """Refuse a balance loss that could not act, or that the model's family does not have.

    Raises:
        ConfigError: the model is dense, or is balanced in another way.
    """
    setting = f"algorithm.router_aux_loss_coef = {coef}"
    kind = model.config.model_type
    if coef > 0 and not experts_of(model):
        raise ConfigError(f"{setting}: {kind} is no mixture of experts, so there is nothing to balance; leave it out")
    if coef > 0 and "router_aux_loss_coef" not in model.config.get_text_config().to_dict():
        raise ConfigError(
            f"{setting}: {kind} has no such loss; its experts are balanced by a bias of the router "
            "(e_score_correction_bias), which stays as it is; leave it out"
        )


def _can_switch(module: nn.Module) -> bool:
    return module.__dict__.keys() >= _DECORATED


_DECORATED = {"has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "is_concatenated"}
"""What transformers' decorator of experts classes leaves in their objects."""


def _refuse_strangers(model: PreTrainedModel) -> None:
    for name, module in model.named_modules():
        kind = type(module).__name__
        if _can_switch(module):
            _refuse_unlike(model, module)
        elif (name.endswith(".experts") or re.search("(?<!Shared)(Experts|ExpertGLU|MoE)$", kind)) and not any(
            map(_can_switch, module.modules())
        ):
            raise _refused(model, f"has experts ({kind}) whose function cannot be chosen in transformers")


def _refuse_unlike(model: PreTrainedModel, experts: Any) -> None:
    """What `even_experts` does not compute."""
    own_gate = type(experts)._apply_gate.__module__ != ALL_EXPERTS_FUNCTIONS.__class__.__module__
    found: Mapping[str, bool] = {
        "a gate of their own": own_gate or not experts.is_concatenated or not experts.has_gate,
        "biases": experts.has_bias,
        "a norm": experts.has_post_expert_norm,
    }
    unlike = [what for what, present in found.items() if present]
    if unlike:
        raise _refused(model, f"has experts ({type(experts).__name__}) with {' and '.join(unlike)}")


def _refuse_chance(model: PreTrainedModel) -> None:
    """Noise acts in training mode, in which layers are that are computed again for the gradient; a token that finds an
    expert full depends on the others."""
    settings: Mapping[str, Any] = model.config.get_text_config().to_dict()
    for name, value in settings.items():
        if "jitter" in name and value:
            raise ConfigError(
                f"{name} = {value} in the config.json of this {model.config.model_type}: with noise on the router "
                "training would choose other experts than the sampler did; set it to 0 there"
            )
    if model.config.model_type == "phimoe":
        raise _refused(model, "draws its experts at random in training")
    if settings.get("expert_capacity"):
        raise _refused(model, "drops tokens that find an expert full (expert_capacity)")


def _refused(model: PreTrainedModel, cause: str) -> ConfigError:
    return ConfigError(
        f"{model.config.model_type} {cause}, so a token's log-prob would depend on its company; use a mixture of "
        "experts of another family (Qwen2-MoE, Qwen3-MoE, Mixtral, OLMoE, GLM-4-MoE, Granite-MoE, …), or a dense model"
    )


ALL_EXPERTS_FUNCTIONS.register(EXPERTS_NAME, even_experts)
