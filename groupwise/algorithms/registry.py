"""Names to functions. A new algorithm is one file, one line here, and one recipe in `groupwise.config.algorithm`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from groupwise.algorithms.advantages.gdpo import gdpo
from groupwise.algorithms.advantages.grpo import grpo
from groupwise.algorithms.advantages.maxrl import maxrl
from groupwise.algorithms.advantages.opo import opo
from groupwise.algorithms.advantages.pass_k import pass_k
from groupwise.algorithms.advantages.reinforce_pp import reinforce_pp
from groupwise.algorithms.advantages.reinforce_pp_baseline import reinforce_pp_baseline
from groupwise.algorithms.advantages.rloo import rloo
from groupwise.algorithms.base import Algorithm, TokenLoss
from groupwise.algorithms.corrections import Correction
from groupwise.algorithms.entropy import EntropyControl
from groupwise.algorithms.losses.cispo import cispo
from groupwise.algorithms.losses.gmpo import gmpo
from groupwise.algorithms.losses.gspo import gspo
from groupwise.algorithms.losses.gspo_token import gspo_token
from groupwise.algorithms.losses.ppo_clip import ppo_clip
from groupwise.algorithms.losses.reinforce import reinforce
from groupwise.algorithms.losses.sapo import sapo
from groupwise.config.algorithm import (
    ADVANTAGE_SETTINGS,
    LOSS_SETTINGS,
    RECIPES,
    AlgorithmConfig,
    AlgorithmRecipe,
)
from groupwise.config.algorithm_checks import check_algorithm

ADVANTAGES: Mapping[str, Callable[..., tuple[Tensor, ...]]] = {
    "grpo": grpo,
    "rloo": rloo,
    "reinforce_pp": reinforce_pp,
    "reinforce_pp_baseline": reinforce_pp_baseline,
    "opo": opo,
    "maxrl": maxrl,
    "pass_k": pass_k,
    "gdpo": gdpo,
}
"""Each takes `AdvantageInputs`, and by keyword the config keys that `ADVANTAGE_SETTINGS` lists for it."""

LOSSES: Mapping[str, Callable[..., TokenLoss]] = {
    "ppo_clip": ppo_clip,
    "gspo": gspo,
    "gspo_token": gspo_token,
    "cispo": cispo,
    "sapo": sapo,
    "gmpo": gmpo,
    "reinforce": reinforce,
}
"""Each takes `LossInputs`, and by keyword the config keys that `LOSS_SETTINGS` lists for it."""


def build_algorithm(config: AlgorithmConfig) -> Algorithm:
    """The algorithm that `config` describes.

    Raises:
        ConfigError: an unknown name (with the nearest known one), or a setting that could not act (with the reason).
    """
    check_algorithm(config)
    values: Mapping[str, Any] = config.model_dump()
    advantage_settings = {key: values[key] for key in ADVANTAGE_SETTINGS[config.advantage]}
    loss_settings = {key: values[key] for key in LOSS_SETTINGS[config.loss]}
    return Algorithm(
        name=config.name,
        advantage=partial(ADVANTAGES[config.advantage], **advantage_settings),
        policy_loss=partial(LOSSES[config.loss], **loss_settings),
        normaliser=config.normaliser,
        kl_coef=config.kl_coef,
        kl_in=config.kl_in,
        kl_estimator=config.kl_estimator,
        entropy_coef=config.entropy_coef,
        entropy_control=_entropy_control(config),
        top_entropy_fraction=config.top_entropy_fraction,
        masks_truncated=config.overlong == "mask",
        correction=Correction(
            kind=config.correction,
            level=config.correction_level or "token",
            low=config.correction_low or 0.0,
            high=math.inf if config.correction_high is None else config.correction_high,
            veto=config.correction_veto,
            off_policy_mask=config.off_policy_mask,
        ),
        router_aux_loss_coef=config.router_aux_loss_coef,
    )


def _entropy_control(config: AlgorithmConfig) -> EntropyControl | None:
    step, low, high = config.entropy_coef_step, config.entropy_coef_min, config.entropy_coef_max
    if config.entropy_target is None or step is None or low is None or high is None:
        return None
    return EntropyControl(config.entropy_target, step, low, high)


def describe_algorithms() -> list[AlgorithmRecipe]:
    """Every algorithm by name: its paper, one line, and the parts it is made of."""
    return list(RECIPES.values())
