"""Rows and their scores as an algorithm takes them: one tensor for each kind of number, token after token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from groupwise.algorithms.base import LossInputs
from groupwise.batches import Denominators, TrainingRow
from groupwise.model.forward.head import TokenScores
from groupwise.model.forward.packing import Packed


def loss_inputs(
    rows: Sequence[TrainingRow],
    packed: Packed,
    scores: TokenScores,
    denominators: Denominators,
    *,
    reference: Tensor | None = None,
) -> LossInputs:
    """Of one micro-batch, on the device of its scores.

    Args:
        rows: what was packed, in its order.
        scores: the policy's, `[M]`.
        reference: `[M]`, the reference's log-probs, where rows do not bring them along.
    """

    def per_token(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=scores.logprobs.dtype, device=scores.logprobs.device)

    known = [row.ref_logprobs for row in rows if row.ref_logprobs is not None]
    recomputed = [row.old_logprobs for row in rows if row.old_logprobs is not None]
    assert len(known) in (0, len(rows)), "some rows of a micro-batch have the reference's log-probs, others not"
    assert len(recomputed) in (0, len(rows)), "some rows of a micro-batch have recomputed log-probs, others not"
    sampled = per_token([x for row in rows for x in row.logprobs])
    return LossInputs(
        logprobs=scores.logprobs,
        old_logprobs=per_token([x for values in recomputed for x in values]) if recomputed else sampled,
        ref_logprobs=per_token([x for values in known for x in values]) if known else reference,
        entropy=scores.entropy,
        advantages=per_token([x for row in rows for x in row.advantages]),
        mask=per_token([float(x) for row in rows for x in row.loss_mask]),
        row=packed.row,
        num_rows=len(rows),
        denominators=denominators,
        sampler_logprobs=sampled if recomputed else None,
    )
