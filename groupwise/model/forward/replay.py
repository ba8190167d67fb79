"""Routing replay (Ma et al. 2025, "Stabilizing MoE Reinforcement Learning by Aligning Training and Inference Routers",
arXiv:2510.11370; R3): tokens take the experts that the sampler chose, with shares of the live router.

The shares are computed by the router's own code, which is given other numbers where it asks for its k largest ones. So
they are each family's own (softmax over all experts or over the chosen, sigmoids without their bias, scaled or not),
and the router learns by them.

Shapes: N packed tokens, of which the pass may have more, as padding; E experts, k choices.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from groupwise.model.forward.as_sampled import ReplayedRoutes


@dataclass(frozen=True, slots=True)
class Forced:
    """The sampler's choices for one router.

    Attributes:
        ids: `[N, k]`; given: `[N]` bool.
        replaced: gets, by router, how many of each token's ids the live router would not have chosen, `[N]` int64.
    """

    ids: Tensor
    given: Tensor
    replaced: list[Tensor] = field(default_factory=list[Tensor])

    def largest(self, scores: Tensor, live: Tensor) -> tuple[Tensor, Tensor]:
        """In place of the k largest of `scores [n, E]`: those of the chosen experts, and their ids.

        A token whose experts are those of `live [n, k]` keeps their order, which decides the last bits of its sum.
        """
        missing = live.shape[0] - self.ids.shape[0]
        ids, given = self.ids.long(), self.given
        if missing:
            ids, given = torch.cat([ids, live[-missing:]]), torch.cat([given, given.new_zeros(missing)])
        known = (ids[:, :, None] == live[:, None, :]).any(-1)
        self.replaced.append(((~known).sum(-1) * given)[: self.ids.shape[0]])
        chosen = torch.where((given & ~known.all(-1))[:, None], ids, live)
        return scores.gather(-1, chosen), chosen

    def asks(self, scores: Tensor, k: int, experts: int) -> bool:
        """Whether the k largest of `scores` are a token's experts: some routers ask for the best groups before."""
        return scores.dim() == 2 and scores.shape[1] == experts and k == self.ids.shape[1]


@dataclass(frozen=True, slots=True)
class Replay:
    """What the routers of one pass are to choose.

    Attributes:
        forced: by router, in the order of layers.

    Example:
        with Replay.of(packed.sampled.routes, routers_of(model)).acting():
            packed_hidden_states(model, packed)
    """

    forced: dict[nn.Module, Forced]

    @staticmethod
    def of(routes: ReplayedRoutes, routers: Sequence[nn.Module]) -> Replay:
        """For the routers of a model, in the order of layers."""
        layers = routes.ids.shape[1]
        assert layers == len(routers), f"routes of {layers} layers for {len(routers)} routers"
        return Replay({router: Forced(routes.ids[:, layer], routes.given) for layer, router in enumerate(routers)})

    @contextmanager
    def acting(self) -> Iterator[None]:
        """Passes of this thread inside choose so."""
        token = _REPLAY.set(self)
        try:
            yield
        finally:
            _REPLAY.reset(token)


_REPLAY: ContextVar[Replay | None] = ContextVar("replay", default=None)


def forced_for(router: nn.Module) -> Forced | None:
    """What the router is to choose in this pass; None where it chooses by itself."""
    replay = _REPLAY.get()
    return None if replay is None else replay.forced[router]


def replay_of_pass() -> Replay | None:
    """What acts now."""
    return _REPLAY.get()


def recomputing() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """For torch's checkpointing: what is around a layer now, and when it is computed again for the gradient, which may
    be in another thread."""
    replay = _REPLAY.get()
    return nullcontext(), nullcontext() if replay is None else _again(replay)


@contextmanager
def _again(replay: Replay) -> Iterator[None]:
    """As in the first pass, and counted once."""
    again = Replay({router: Forced(one.ids, one.given) for router, one in replay.forced.items()})
    with again.acting():
        yield
