"""What has to be known of a mixture of experts for a sampler's choices to be replayed in it."""

from __future__ import annotations

import re
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from groupwise.errors import ConfigError
from groupwise.model.forward.as_sampled import ReplayedRoutes
from groupwise.model.forward.packing import ROW_MULTIPLE
from groupwise.model.forward.replay import Replay
from groupwise.model.forward.routing import routers_of
from groupwise.sides import MOST_EXPERTS, Mixture


def mixture_of(model: PreTrainedModel) -> Mixture | None:
    """Its routers, each tried once; None for a dense model.

    Raises:
        ConfigError: choices cannot be replayed in it; says why.
    """
    routers = routers_of(model)
    if not routers:
        return None
    found = [_tried(model, router) for router in routers]
    names = {module: name for name, module in model.named_modules()}
    numbers = [re.search(r"\.(\d+)\.", names[router]) for router in routers]
    sparse = [int(number[1]) for number in numbers if number is not None]
    if len(set(found)) > 1 or len(sparse) != len(routers) or len(set(sparse)) != len(sparse):
        raise _refused(model, f"has routers of several kinds ({sorted(set(found))})")
    (experts, k) = found[0]
    return Mixture(model.config.get_text_config().num_hidden_layers, tuple(sparse), experts, k)


def required_mixture(model: PreTrainedModel) -> Mixture:
    """As `mixture_of`, of a model whose choices are to be replayed.

    Raises:
        ConfigError: it is dense, too.
    """
    if (mixture := mixture_of(model)) is None:
        raise ConfigError(
            f"rollout.replay_routes = true: {model.config.model_type} is no mixture of experts, so there is nothing to "
            "replay; leave it out"
        )
    return mixture


@torch.no_grad()
def _tried(model: PreTrainedModel, router: nn.Module) -> tuple[int, int]:
    """Experts and choices of a router that chooses what it is told to."""
    weight = next(router.parameters())
    experts = int(cast(Any, router).num_experts)
    hidden = weight.new_zeros(ROW_MULTIPLE, weight.shape[-1])
    k = int(router(hidden)[-1].shape[-1])
    if experts > MOST_EXPERTS:
        raise _refused(model, f"has {experts:,} experts in a layer")
    wanted = torch.arange(ROW_MULTIPLE, device=weight.device)[:, None] + torch.arange(k, device=weight.device) + 1
    wanted = (wanted % experts).to(torch.int16)
    given = torch.ones(ROW_MULTIPLE, dtype=torch.bool, device=weight.device)
    with Replay.of(ReplayedRoutes(wanted[:, None], given), [router]).acting():
        chosen = router(hidden)[-1]
    if not torch.equal(chosen.sort(-1).values, wanted.long().sort(-1).values):
        raise _refused(model, f"has routers ({type(router).__name__}) that do not choose by their k largest scores")
    return experts, k


def _refused(model: PreTrainedModel, cause: str) -> ConfigError:
    return ConfigError(
        f"rollout.replay_routes: {model.config.model_type} {cause}, so a sampler's choices cannot be replayed in it; "
        "set it to false"
    )
