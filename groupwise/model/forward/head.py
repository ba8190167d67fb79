"""From hidden states to log-probs, in chunks of tokens: logits of all tokens never exist together.

In training each chunk is recomputed in the backward pass, so memory grows with `chunk x vocabulary`, not with
`tokens x vocabulary`. Only where all chunks together are small (a small vocabulary) are they kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from groupwise.model.exact.blocks import wide
from groupwise.model.fast_cpu.evenly import row_sums
from groupwise.model.fast_gpu.layers import fused
from groupwise.model.fast_gpu.layers import logprobs as row_logprobs
from groupwise.model.forward.as_sampled import KeptTokens
from groupwise.model.forward.packing import ROW_MULTIPLE, pad_rows
from groupwise.model.invariant.linear import InvariantLinear
from groupwise.model.invariant.sums import fixed_row_sums

RowSums = Callable[[Tensor], Tensor]
"""`[M, V]` to `[M]`."""

_KEPT_BYTES = 1 << 28  # weights of one pass that training keeps rather than computes again
_NARROW = 4  # rows of a GPU's kernels in the memory of one


@dataclass(frozen=True, slots=True)
class TokenScores:
    """Log-prob of each target `[M]` and, where asked for, its distribution's entropy in nats `[M]`; both float32."""

    logprobs: Tensor
    entropy: Tensor | None


class LanguageHead:
    """Hidden states `[M, H]` to logits `[M, V]` float32, with the scaling or soft cap that the architecture has.

    Attributes:
        row_sums: how sums over the vocabulary are taken: in a batch-invariant model, in a fixed order.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        layer = model.get_output_embeddings()
        assert isinstance(layer, nn.Module), "a causal language model has an output layer"
        self._layer = layer
        self.row_sums: RowSums = fixed_row_sums if isinstance(layer, InvariantLinear) else row_sums
        config = model.config.get_text_config()
        self.vocabulary: int = config.vocab_size
        settings = config.to_dict()
        self._softcap: float | None = settings.get("final_logit_softcapping")
        self._factor = settings.get("logit_scale", 1.0) / settings.get("logits_scaling", 1.0)

    def logits(self, hidden: Tensor, *, as_computed: bool = False) -> Tensor:
        """Rows are padded to `ROW_MULTIPLE` so that each row has the same bits in any company.

        Args:
            as_computed: not widened to float32, where the architecture does nothing with them.
        """
        logits = self._layer(pad_rows(hidden))
        logits = logits if logits.shape[0] == hidden.shape[0] else logits[: hidden.shape[0]]
        if as_computed and self._factor == 1.0 and self._softcap is None:
            return logits
        logits = wide(logits)
        if self._factor != 1.0:
            logits = logits * self._factor
        if self._softcap is not None:
            logits = torch.tanh(logits / self._softcap) * self._softcap
        return logits


@dataclass(frozen=True, slots=True)
class Weighed:
    """Unnormalised probabilities: `weights [M, V]` = exp(logits - `top [M]`), and their sums `mass [M]`."""

    weights: Tensor
    top: Tensor
    mass: Tensor

    @property
    def log_normaliser(self) -> Tensor:
        """`[M]`, the log of the sum of exponentials of the logits."""
        return self.top + self.mass.log()


def weigh(logits: Tensor, *, in_place: bool = False, sums: RowSums = row_sums) -> Weighed:
    """Exponentials of `logits [M, V]`, safe from overflow; `in_place` writes them over the logits."""
    top = logits.detach().amax(-1)
    weights = (logits.sub_(top[:, None]) if in_place else logits - top[:, None]).exp_()
    return Weighed(weights, top, sums(weights))


def target_logprobs(
    logits: Tensor,
    targets: Tensor,
    weighed: Weighed | None = None,
    *,
    in_place: bool = False,
    sums: RowSums = row_sums,
) -> Tensor:
    """`[M]` log-probs of `targets [M]` under the rows of `logits [M, V]`.

    Args:
        weighed: that of the logits, when it is known.
        in_place: the logits are used for nothing else, and may be written over.
    """
    if fused(logits):
        return row_logprobs(logits, targets, None, in_place=in_place)
    return _TargetLogprobs.apply(logits, targets, weighed, in_place, sums)


class _TargetLogprobs(torch.autograd.Function):
    """One pass over `[M, V]` in the backward: a logit's gradient is (1 where it is the target) - its probability."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, weighed: Weighed | None, in_place: bool, sums: RowSums
    ) -> Tensor:
        chosen = logits.gather(-1, targets[:, None]).squeeze(-1)
        weighed = weighed or weigh(logits, in_place=in_place, sums=sums)
        ctx.save_for_backward(weighed.weights, weighed.mass, targets)
        # The top goes first: its digits would drown those of the mass.
        return chosen - weighed.top - weighed.mass.log()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        weights, mass, targets = ctx.saved_tensors
        # Written over: a second backward pass is refused by autograd's own check.
        grad = weights.mul_((-grads[0] / mass)[:, None])
        return grad.scatter_add_(-1, targets[:, None], grads[0][:, None]), None, None, None, None


def scale_by_temperature(logits: Tensor, temperature: Tensor | float) -> Tensor:
    """Logits of the distribution that is sampled; temperature 0 (greedy) counts as 1."""
    if isinstance(temperature, Tensor):
        return logits / torch.where(temperature > 0, temperature, 1.0)[:, None]
    # By a tensor, as above: a GPU multiplies by the reciprocal of a plain number, which gives other bits.
    return logits if temperature in (0.0, 1.0) else logits / logits.new_full((), temperature)


def token_scores(
    head: LanguageHead,
    hidden: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    chunk_tokens: int = 1024,
    with_entropy: bool = False,
    kept: KeptTokens | None = None,
) -> TokenScores:
    """Log-probs (and entropies) of `targets [M]` predicted from `hidden [M, H]`, differentiable.

    Args:
        temperature: the sampling temperature; the log-probs are those of the sampled distribution.
        chunk_tokens: rows whose logits exist at one time, rounded up to `ROW_MULTIPLE`; by a GPU's kernels, four times
            as many.
        kept: what filters left of the vocabulary: log-probs and entropies are of the distribution over these tokens.
    """
    if fused(hidden) and not with_entropy:
        chunk_tokens *= _NARROW  # in the same memory: no float32 copy is made, and none of the weights
    chunk_tokens = -(-chunk_tokens // ROW_MULTIPLE) * ROW_MULTIPLE

    def cut(logits: Tensor, first: int) -> Tensor:
        return logits if kept is None else kept.cut(logits, first)

    def one(rows: Tensor, wanted: Tensor, first: int) -> tuple[Tensor, Tensor]:
        if fused(rows) and not with_entropy:
            raw = cut(head.logits(rows, as_computed=True), first)
            divisor = None if temperature in (0.0, 1.0) else raw.new_full((len(raw),), temperature, dtype=torch.float32)
            found = row_logprobs(raw, wanted, divisor, in_place=True)
            return found, found.detach()
        logits = cut(scale_by_temperature(head.logits(rows), temperature), first)
        logprobs = target_logprobs(logits, wanted, in_place=not with_entropy, sums=head.row_sums)
        if not with_entropy:
            return logprobs, logprobs.detach()
        return logprobs, entropy_of(logits, sums=head.row_sums)

    keep = 4 * hidden.shape[0] * head.vocabulary <= _KEPT_BYTES and not with_entropy
    logprobs: list[Tensor] = []
    entropies: list[Tensor] = []
    starts = range(0, max(hidden.shape[0], 1), chunk_tokens)
    for rows, wanted, first in zip(hidden.split(chunk_tokens), targets.split(chunk_tokens), starts, strict=True):
        if torch.is_grad_enabled() and not keep:
            pair = checkpoint(one, rows, wanted, first, use_reentrant=False)
            assert isinstance(pair, tuple)
        else:
            pair = one(rows, wanted, first)
        logprobs.append(pair[0])
        entropies.append(pair[1])
    return TokenScores(torch.cat(logprobs), torch.cat(entropies) if with_entropy else None)


def entropy_of(logits: Tensor, *, sums: RowSums = row_sums) -> Tensor:
    """`[M]` entropy in nats of the rows of `logits [M, V]`: H = log Z - E[logit]."""
    weighed = weigh(logits, sums=sums)
    return weighed.log_normaliser - sums(weighed.weights * logits) / weighed.mass
