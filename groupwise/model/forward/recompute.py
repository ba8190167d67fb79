"""Gradient checkpointing (Chen et al. 2016): layers keep no activations, and compute them again for the gradient."""

from __future__ import annotations

import warnings
from typing import Any

from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from groupwise.model.forward.replay import recomputing
from groupwise.model.forward.routing import routers_of


def recomputes_layers(model: PreTrainedModel) -> bool:
    """Whether it is switched on; it acts in training mode alone."""
    return any(m.gradient_checkpointing for m in model.modules() if isinstance(m, GradientCheckpointingLayer))


def recompute_layers(model: PreTrainedModel, on: bool = True) -> None:
    """Switch it on or off."""
    with warnings.catch_warnings():
        # Newer versions of transformers have a second name, which 5.16 has not.
        warnings.simplefilter("ignore", FutureWarning)
        if on:
            settings: dict[str, Any] = {"use_reentrant": False}
            if routers_of(model):  # a layer that is computed again must choose as it did
                settings["context_fn"] = recomputing
            model.gradient_checkpointing_enable(settings)
        else:
            model.gradient_checkpointing_disable()
