"""Logits and one uniform number per row become tokens: filters, then the inverse of the cumulative distribution.

Every operation works on rows alone, and a filter that a row does not use leaves its bits as they are; so a row's token
does not depend on the rows beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from groupwise.model.exact.blocks import wide
from groupwise.model.fast_cpu.evenly import row_cumsums, row_sums
from groupwise.model.fast_gpu.layers import fused
from groupwise.model.forward.head import RowSums, Weighed, scale_by_temperature, target_logprobs, weigh
from groupwise.model.invariant.launching import aligned
from groupwise.types import SamplingParams

_SPAN = 128  # tokens whose mass is summed before the search


@dataclass(frozen=True, slots=True)
class RowParams:
    """Sampling parameters of B rows; a filter that no row uses is None.

    Attributes:
        temperature: `[B]` float32, 0 for greedy; `any_greedy` says whether one is, `any_scaled` whether one is
            neither 0 nor 1.
        top_k: `[B]` int64 (0: all). top_p, min_p, penalty: `[B]` float32.
    """

    temperature: Tensor
    any_greedy: bool
    any_scaled: bool
    top_k: Tensor | None
    top_p: Tensor | None
    min_p: Tensor | None
    penalty: Tensor | None

    @property
    def any_filter(self) -> bool:
        return self.top_k is not None or self.top_p is not None or self.min_p is not None

    @staticmethod
    def of(rows: Sequence[SamplingParams], device: torch.device) -> RowParams:
        def column(values: list[float], neutral: float, dtype: torch.dtype = torch.float32) -> Tensor | None:
            if all(value == neutral for value in values):
                return None
            return torch.tensor(values, dtype=dtype, device=device)

        return RowParams(
            temperature=torch.tensor([row.temperature for row in rows], dtype=torch.float32, device=device),
            any_greedy=any(row.temperature == 0 for row in rows),
            any_scaled=any(row.temperature not in (0.0, 1.0) for row in rows),
            top_k=column([row.top_k for row in rows], 0, torch.int64),
            top_p=column([row.top_p for row in rows], 1.0),
            min_p=column([row.min_p for row in rows], 0.0),
            penalty=column([row.repetition_penalty for row in rows], 1.0),
        )


@dataclass(frozen=True, slots=True)
class Forbidden:
    """What cannot be drawn (stop tokens before `min_tokens`), pair by pair: `rows [F]` and `tokens [F]`, int64."""

    rows: Tensor
    tokens: Tensor

    def hidden_in(self, logits: Tensor) -> Tensor:
        """A copy of `logits [B, V]` with `-inf` at the pairs."""
        return logits.index_put((self.rows, self.tokens), logits.new_tensor(-torch.inf))


@dataclass(frozen=True, slots=True)
class Choice:
    """`tokens [B]` int64 and their `logprobs [B]` float32 under the policy at its temperature, before filters.

    Attributes:
        likeliest: `[B, K]` int64, the policy's most probable tokens, and `their_logprobs [B, K]`; None unless they are
            asked for.
    """

    tokens: Tensor
    logprobs: Tensor
    likeliest: Tensor | None = None
    their_logprobs: Tensor | None = None

    @staticmethod
    def of(tokens: Tensor, logits: Tensor, *, likeliest: int, logprobs: Callable[[Tensor], Tensor]) -> Choice:
        """With the `likeliest` most probable tokens of `logits [B, V]`, where there are so many.

        Args:
            logprobs: those of tokens `[B]`, the same computation for all of them.
        """
        if not likeliest:
            return Choice(tokens, logprobs(tokens))
        most = logits.topk(min(likeliest, logits.shape[-1])).indices
        theirs = torch.stack([logprobs(column) for column in most.T.contiguous()], -1)
        return Choice(tokens, logprobs(tokens), most, theirs)


def choose(
    logits: Tensor,
    uniform: Tensor,
    params: RowParams,
    *,
    seen: Tensor | None = None,
    forbidden: Forbidden | None = None,
    sums: RowSums = row_sums,
    likeliest: int = 0,
) -> Choice:
    """Draw one token per row.

    Args:
        logits: `[B, V]` float32, straight from the head; on a GPU also in the model's type.
        uniform: `[B]` float64 in [0, 1).
        seen: `[B, V]` bool, tokens that the repetition penalty concerns; needed when `params.penalty` is set.
        forbidden: tokens that cannot be drawn.
        sums: the head's `row_sums`.
        likeliest: so many of the most probable tokens are told with those that are drawn.
    """
    if fused(logits):
        return _choose_on_gpu(logits, uniform, params, seen=seen, forbidden=forbidden, likeliest=likeliest)
    return _choose_by_rows(logits, uniform, params, seen=seen, forbidden=forbidden, sums=sums, likeliest=likeliest)


def _choose_by_rows(
    logits: Tensor,
    uniform: Tensor,
    params: RowParams,
    *,
    seen: Tensor | None,
    forbidden: Forbidden | None,
    sums: RowSums,
    likeliest: int,
) -> Choice:
    """By torch's operations, on a CPU or wherever no kernel stands for them."""
    temperature = params.temperature if params.any_scaled else 1.0
    policy = scale_by_temperature(logits, temperature)
    weighed = weigh(policy, sums=sums)
    wanted = logits
    if params.penalty is not None:
        assert seen is not None, "a repetition penalty needs the tokens seen"
        wanted = _penalise(wanted, seen, params.penalty)
    if wanted is logits and not params.any_filter:
        if forbidden is not None:
            _take_away(forbidden, policy, weighed)
        weights = weighed.weights
    else:
        scaled = policy if wanted is logits else scale_by_temperature(wanted, temperature)
        weights = weigh(_filter(scaled if forbidden is None else forbidden.hidden_in(scaled), params)).weights
    tokens = invert_cdf(weights, uniform, sums=sums)
    if params.any_greedy:
        best = wanted if forbidden is None else forbidden.hidden_in(wanted)
        tokens = torch.where(params.temperature > 0, tokens, best.argmax(-1))
    return Choice.of(tokens, policy, likeliest=likeliest, logprobs=lambda some: target_logprobs(policy, some, weighed))


def _choose_on_gpu(
    logits: Tensor,
    uniform: Tensor,
    params: RowParams,
    *,
    seen: Tensor | None,
    forbidden: Forbidden | None,
    likeliest: int,
) -> Choice:
    """By kernels that read the logits as the head gives them, and the trainer's own for the log-probs."""
    from groupwise.model.fast_gpu.scores_kernel import logprob_rows, pick_tokens, weigh_rows

    temperature = params.temperature if params.any_scaled or params.any_greedy else None
    logits = aligned(logits)
    wanted, divisor = logits, temperature
    if params.penalty is not None:
        assert seen is not None, "a repetition penalty needs the tokens seen"
        wanted = _penalise(wide(wanted), seen, params.penalty)
    if params.any_filter:
        scaled = wide(wanted) if temperature is None else scale_by_temperature(wide(wanted), temperature)
        wanted = _filter(scaled if forbidden is None else forbidden.hidden_in(scaled), params)
        divisor = None if temperature is None else (temperature > 0).float()  # divided already; 0 is greedy still
    elif forbidden is not None:
        wanted = forbidden.hidden_in(wanted)
    tokens, found = pick_tokens(wanted, uniform, divisor, any_greedy=params.any_greedy)
    if wanted is not logits:
        found = weigh_rows(logits, temperature)
    return Choice.of(
        tokens,
        logits,
        likeliest=likeliest,
        logprobs=lambda some: logprob_rows(logits, aligned(some), temperature, found),
    )


def _take_away(forbidden: Forbidden, logits: Tensor, weighed: Weighed) -> None:
    """Leave in `weighed.weights` those of the tokens that are left, the bits of `weigh` over logits with `-inf` at the
    others: a row that loses its most likely token is weighed again. Top and mass stay the policy's."""
    rows, tokens = forbidden.rows, forbidden.tokens
    lost_top = rows[logits[rows, tokens] >= weighed.top[rows]]
    weighed.weights[rows, tokens] = 0
    if lost_top.numel():
        weighed.weights[lost_top] = weigh(forbidden.hidden_in(logits)[lost_top]).weights


def _penalise(logits: Tensor, seen: Tensor, penalty: Tensor) -> Tensor:
    """Keskar et al. 2019 (CTRL), section 4.1, in the common form that lowers negative logits as well."""
    factor = penalty[:, None]
    return torch.where(seen, torch.where(logits > 0, logits / factor, logits * factor), logits)


def _filter(logits: Tensor, params: RowParams) -> Tensor:
    """Logits with `-inf` where top-k, then top-p (Holtzman et al. 2020), then min-p (Nguyen et al. 2024) cut.

    Tokens as likely as the last one kept are kept too, so no choice depends on the order of a sort.
    """
    if not params.any_filter:
        return logits
    least = torch.full_like(logits[:, 0], -torch.inf)
    if params.top_k is not None or params.top_p is not None:
        ordered = logits.sort(-1, descending=True).values
        if params.top_k is not None:
            k = torch.where(params.top_k > 0, params.top_k, logits.shape[-1]).clamp(max=logits.shape[-1])
            least = ordered.gather(-1, k[:, None] - 1).squeeze(-1)
            ordered = ordered.masked_fill(ordered < least[:, None], -torch.inf)
        if params.top_p is not None:
            mass = ordered.softmax(-1)
            kept = ((row_cumsums(mass) - mass) < params.top_p[:, None]).sum(-1).clamp(min=1)
            cut = ordered.gather(-1, kept[:, None] - 1).squeeze(-1)
            least = torch.where(params.top_p < 1, torch.maximum(least, cut), least)
    if params.min_p is not None:
        least = torch.maximum(least, logits.amax(-1) + params.min_p.log())
    return logits.masked_fill(logits < least[:, None], -torch.inf)


def invert_cdf(weights: Tensor, uniform: Tensor, *, sums: RowSums = row_sums) -> Tensor:
    """`[B]` tokens: the first whose cumulative probability exceeds `uniform [B]`, by spans and then within one span.

    Args:
        weights: `[B, V]`, probabilities up to a factor.
    """
    rows, vocabulary = weights.shape
    missing = -vocabulary % _SPAN
    spans = (pad(weights, (0, missing)) if missing else weights).view(rows, -1, _SPAN)
    upto = row_cumsums(sums(spans.flatten(0, 1)).view(rows, -1).double())
    point = uniform * upto[:, -1]
    span = (upto <= point[:, None]).sum(-1).clamp(max=spans.shape[1] - 1)
    before = torch.where(span > 0, upto.gather(-1, (span - 1).clamp(min=0)[:, None]).squeeze(-1), 0.0)
    inside = spans.gather(1, span[:, None, None].expand(-1, 1, _SPAN)).squeeze(1).double()
    within = (row_cumsums(inside) <= (point - before)[:, None]).sum(-1)
    # Rounding can put the point past the span's end; its last token with any mass is meant then.
    last = _SPAN - 1 - (inside > 0).flip(-1).int().argmax(-1)
    return span * _SPAN + torch.minimum(within, last)
