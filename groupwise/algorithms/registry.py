"""Names to functions. A new algorithm is one file, one line here, and one recipe in `groupwise.config.algorithm`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from groupwise.algorithms.advantages.gdpo import gdpo
from groupwise.algorithms.advantages.grpo import grpo
from groupwise.algorithms.advantages.maxrl import maxrl
from groupwise.algorithms.advantages.none import none
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
from groupwise.algorithms.teacher import TeacherCredit
from groupwise.config.algorithm import RECIPES, AdaptiveEntropy, AlgorithmConfig, AlgorithmRecipe, Teacher
from groupwise.config.base import Variant

ADVANTAGES: Mapping[str, Callable[..., tuple[Tensor, ...]]] = {
    "grpo": grpo,
    "rloo": rloo,
    "reinforce_pp": reinforce_pp,
    "reinforce_pp_baseline": reinforce_pp_baseline,
    "opo": opo,
    "maxrl": maxrl,
    "pass_k": pass_k,
    "gdpo": gdpo,
    "none": none,
}
"""Each takes `AdvantageInputs`, and by keyword the settings of its class in `groupwise.config.algorithm.advantages`."""

LOSSES: Mapping[str, Callable[..., TokenLoss]] = {
    "ppo_clip": ppo_clip,
    "gspo": gspo,
    "gspo_token": gspo_token,
    "cispo": cispo,
    "sapo": sapo,
    "gmpo": gmpo,
    "reinforce": reinforce,
}
"""Each takes `LossInputs`, and by keyword the settings of its class in `groupwise.config.algorithm.losses`."""


def build_algorithm(config: AlgorithmConfig) -> Algorithm:
    """The algorithm that `config` describes."""
    return Algorithm(
        name=config.name,
        advantage=partial(ADVANTAGES[config.advantage.name], **_settings(config.advantage)),
        policy_loss=partial(LOSSES[config.loss.name], **_settings(config.loss)),
        normaliser=config.normaliser,
        kl_coef=config.kl.coef,
        kl_in=config.kl.place,
        kl_estimator=config.kl.estimator,
        entropy_coef=config.entropy.coef,
        entropy_control=_entropy_control(config),
        top_entropy_fraction=config.entropy.top_fraction,
        masks_truncated=config.overlong == "mask",
        correction=Correction(kind=config.correction.name, **_settings(config.correction)),
        router_aux_loss_coef=config.router_aux_loss_coef,
        teacher=_teacher(config),
        needs_reward=config.advantage.needs_reward,
    )


def _settings(part: Variant) -> dict[str, Any]:
    """All but the key that chose it."""
    return {key: value for key, value in part if key != part.chosen_by}


def _entropy_control(config: AlgorithmConfig) -> EntropyControl | None:
    entropy = config.entropy
    if not isinstance(entropy, AdaptiveEntropy):
        return None
    return EntropyControl(entropy.target, entropy.coef_step, entropy.coef_min, entropy.coef_max)


def _teacher(config: AlgorithmConfig) -> TeacherCredit | None:
    teacher = config.teacher
    return TeacherCredit(teacher.coef, teacher.clamp) if isinstance(teacher, Teacher) else None


def describe_algorithms() -> list[AlgorithmRecipe]:
    """Every algorithm by name: its paper, one line, and the parts it is made of."""
    return list(RECIPES.values())
