"""How far the sampler's log-probs are from the trainer's, while both have the same weights."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from groupwise.algorithms.base import LossInputs
from groupwise.batches import TrainingRow
from groupwise.metrics import Max, Mean

logger = logging.getLogger("groupwise.policy")


def mismatch_metrics(rows: Sequence[TrainingRow], inputs: LossInputs, *, exact: bool) -> dict[str, Mean | Max]:
    """Mean and maximum over the tokens that count.

    Args:
        exact: there should be no difference; the first one is then told of.
    """
    sampled = inputs.old_logprobs if inputs.sampler_logprobs is None else inputs.sampler_logprobs
    drift = ((inputs.logprobs.detach() - sampled) * inputs.mask).abs()
    largest = float(drift.max())
    if largest > 0 and exact:
        first = int((drift > 0).nonzero()[0])
        row = int(inputs.row[first])
        place = first - sum(len(r.token_ids) for r in rows[:row])
        logger.warning(
            "sampler and trainer differ by up to %.3g; first at token %d of a completion of group %d",
            largest,
            place,
            rows[row].group,
        )
    return {
        "sampling/sampling_logp_difference/mean": Mean(float(drift.sum()), float(inputs.mask.sum())),
        "sampling/sampling_logp_difference/max": Max(largest),
    }
