"""What the routers of a mixture of experts chose for an optimiser batch: for its metrics, and for its balance loss."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace

import torch

from groupwise.batches import Denominators
from groupwise.model.forward.hidden_states import packed_hidden_states
from groupwise.model.forward.packing import Packed
from groupwise.model.forward.routing import ExpertCounts, Routing, sum_counts
from groupwise.model.forward.scoring import ScoringModel
from groupwise.policy.microbatches import MicroBatch
from groupwise.policy.streams import Streams


def routing_of(batch: MicroBatch, packed: Packed, *, keeps_logits: bool = False) -> Routing:
    """A record for the pass over `packed`, the micro-batch's tokens.

    Args:
        keeps_logits: for the balance loss.
    """
    mask = torch.tensor([x for row in batch.rows for x in row.loss_mask], device=packed.predictors.device)
    return Routing.of(packed, mask, keeps_logits=keeps_logits)


def with_expert_counts(
    denominators: Denominators,
    scoring: ScoringModel,
    streams: Streams,
    *,
    batches: Sequence[MicroBatch],
    packs: Sequence[Packed],
) -> Denominators:
    """With the counts over all of these micro-batches, unless there are some already.

    They take a forward of their own, because the loss of the first micro-batch depends on the choices in the last.
    Where the sampler's choices are replayed, these are counted.
    """
    if denominators.expert_counts is not None:
        return denominators

    @torch.no_grad()
    def count(one: tuple[MicroBatch, Packed]) -> ExpertCounts:
        routing = routing_of(*one)
        replay = scoring.replay_of(one[1])
        with nullcontext() if replay is None else replay.acting(), routing.recording():
            packed_hidden_states(scoring.model, one[1])
        return routing.expert_counts

    counts = list(streams.map(count, list(zip(batches, packs, strict=True))))
    return replace(denominators, expert_counts=sum_counts(counts))
