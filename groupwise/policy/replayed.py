"""Experts that cannot be those of the tokens they came with."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from groupwise.batches import TrainingRow
from groupwise.model.forward.packing import Packed
from groupwise.model.forward.routing import Routing

logger = logging.getLogger("groupwise.policy")

_STRANGE = 0.5
"""A sampler in another precision chooses a few in a hundred otherwise; another text's choices are nearly all others."""


def tell_strangers(rows: Sequence[TrainingRow], packed: Packed, routing: Routing) -> None:
    """Warn of a row whose replayed experts the policy's own routers would mostly not have chosen.

    Args:
        rows: of the pass over `packed`; routing: its record.
    """
    if not routing.replaced:
        return
    replaced = routing.replaced_of_tokens()[packed.predictors].double()
    counts = torch.zeros(len(rows), dtype=torch.float64, device=replaced.device)
    tokens = torch.zeros_like(counts).index_add_(0, packed.row, torch.ones_like(replaced))
    shares = counts.index_add_(0, packed.row, replaced) / (tokens * routing.choices)
    worst = int(shares.argmax())
    if float(shares[worst]) > _STRANGE:
        logger.warning(
            "%.0f %% of the experts that the engine named for a completion of group %d are others than the policy's "
            "own: they are likely those of another request",
            100 * float(shares[worst]),
            rows[worst].group,
        )
