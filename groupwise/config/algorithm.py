"""The algorithm: advantages, policy loss, KL, corrections.

`name` picks a recipe, which is nothing but values of other keys. A key that is not given takes the recipe's value, or
that of the chosen loss, advantage or correction; a key that these do not use becomes none, and giving it is refused.
So the resolved config shows every number that acts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Literal

from pydantic import Field, model_validator

from groupwise.config.base import Section


@dataclass(frozen=True, slots=True)
class AlgorithmRecipe:
    """What a name stands for.

    Attributes:
        paper: where it was published.
        summary: one line for people.
        settings: values of other keys where the recipe differs from the defaults of its parts.

    Example:
        AlgorithmRecipe("dapo", "arXiv:2503.14476", summary="a higher upper clip", settings={"clip_high": 0.28})
    """

    name: str
    paper: str
    _: KW_ONLY
    summary: str
    advantage: str = "grpo"
    loss: str = "ppo_clip"
    normaliser: str = "token"
    settings: Mapping[str, Any] = field(default_factory=dict)


RECIPES: Mapping[str, AlgorithmRecipe] = {
    recipe.name: recipe
    for recipe in (
        AlgorithmRecipe(
            "grpo", "arXiv:2402.03300", summary="group-normalised rewards, clipped ratio, mean over the batch's tokens"
        ),
        AlgorithmRecipe(
            "dr_grpo",
            "arXiv:2503.20783",
            summary="no division by std or length, which favour easy prompts and long wrong answers",
            normaliser="constant",
            settings={"scale": "none"},
        ),
        AlgorithmRecipe(
            "dapo",
            "arXiv:2503.14476",
            summary="grpo with a higher upper clip, against entropy collapse",
            settings={"clip_high": 0.28},
        ),
        AlgorithmRecipe(
            "bnpo", "arXiv:2402.03300", summary="token mean over a batch; over the optimiser batch it is grpo's loss"
        ),
        AlgorithmRecipe(
            "gspo",
            "arXiv:2507.18071",
            summary="one ratio per completion, for mixtures of experts and long answers",
            loss="gspo",
            normaliser="sequence",
        ),
        AlgorithmRecipe(
            "gspo_token",
            "arXiv:2507.18071",
            summary="gspo whose advantage may differ from token to token",
            loss="gspo_token",
            normaliser="sequence",
        ),
        AlgorithmRecipe(
            "cispo", "arXiv:2506.13585", summary="clips the weight, not the gradient, so no token is lost", loss="cispo"
        ),
        AlgorithmRecipe(
            "sapo", "arXiv:2511.20347", summary="a soft gate in place of the clip", loss="sapo", normaliser="sequence"
        ),
        AlgorithmRecipe(
            "gmpo",
            "arXiv:2507.20673",
            summary="the geometric mean of clipped token ratios, robust to outlier tokens",
            loss="gmpo",
            normaliser="sequence",
        ),
        AlgorithmRecipe(
            "reinforce_pp",
            "arXiv:2501.03262",
            summary="rewards whitened over the batch, without a baseline per prompt",
            advantage="reinforce_pp",
        ),
        AlgorithmRecipe(
            "reinforce_pp_baseline",
            "arXiv:2501.03262",
            summary="rewards less the group's mean, whitened over the batch",
            advantage="reinforce_pp_baseline",
        ),
        AlgorithmRecipe(
            "rloo",
            "arXiv:2402.14740",
            summary="leave-one-out baseline and plain policy gradient",
            advantage="rloo",
            loss="reinforce",
            normaliser="constant",
        ),
        AlgorithmRecipe(
            "opo",
            "arXiv:2505.23585",
            summary="the length-weighted baseline of least variance and plain policy gradient",
            advantage="opo",
            loss="reinforce",
            normaliser="constant",
        ),
        AlgorithmRecipe(
            "maxrl",
            "arXiv:2602.02710",
            summary="divides by the group's mean reward, so hard prompts weigh more",
            advantage="maxrl",
            loss="reinforce",
            normaliser="constant",
        ),
        AlgorithmRecipe(
            "pass_k",
            "arXiv:2508.10751",
            summary="rewards at least one right answer in k, for exploration",
            advantage="pass_k",
        ),
        AlgorithmRecipe(
            "gdpo",
            "arXiv:2601.05242",
            summary="normalises each of several rewards before it sums them",
            advantage="gdpo",
        ),
    )
}

ADVANTAGE_SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "grpo": {"scale": "group"},
    "rloo": {},
    "reinforce_pp": {},
    "reinforce_pp_baseline": {},
    "opo": {},
    "maxrl": {},
    "pass_k": {"pass_k": 4, "pass_k_threshold": 0.0},
    "gdpo": {},
}
"""The keys that each advantage takes, with their defaults."""

LOSS_SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "ppo_clip": {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": None},
    "gspo": {"clip_low": 3e-4, "clip_high": 4e-4},
    "gspo_token": {"clip_low": 3e-4, "clip_high": 4e-4},
    "cispo": {"clip_low": 1.0, "clip_high": 4.0},
    "sapo": {"sapo_temperature_positive": 1.0, "sapo_temperature_negative": 1.05},
    "gmpo": {"clip_low": 1 - math.exp(-0.4), "clip_high": math.exp(0.4) - 1},
    "reinforce": {},
}
"""The keys that each loss takes, with their defaults; none as a default means off."""

CORRECTION_SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "none": {},
    "truncate": {"correction_level": "token", "correction_high": 2.0},
    "mask": {"correction_level": "token", "correction_low": 0.5, "correction_high": 5.0},
    "decoupled": {"correction_level": "token"},
}
"""The keys that each mismatch correction takes, with their defaults."""

SEQUENCE_LOSSES = ("gspo", "gmpo")
"""Losses with one ratio per completion."""

KL_SETTINGS: Mapping[str, Mapping[str, Any]] = {"loss": {"kl_estimator": "k3"}, "reward": {"kl_estimator": "k1"}}
"""The keys that each place of the KL takes, with their defaults."""

SWITCHED_SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "reference_sync_every": {"reference_mixup": 0.6},
    "entropy_target": {"entropy_coef_step": 0.005, "entropy_coef_min": 0.0, "entropy_coef_max": 1.0},
}
"""A key that is off when it is 0 or none, and the keys that act while it is on, with their defaults."""


class AlgorithmConfig(Section):
    name: str = Field("grpo", description="`groupwise algorithms` lists them")
    advantage: str = Field("grpo", description="how rewards become advantages; not given: the algorithm's own")
    scale: Literal["group", "batch", "none"] | None = Field(
        "group", description="advantage grpo: divide by the std of the group, of the batch, or not at all"
    )
    pass_k: int | None = Field(None, ge=1, description="advantage pass_k: k; below group_size, or all advantages are 0")
    pass_k_threshold: float | None = Field(None, description="advantage pass_k: a reward above this is a right answer")
    loss: str = Field("ppo_clip", description="the policy loss; not given: the algorithm's own")
    normaliser: Literal["token", "sequence", "constant"] = Field(
        "token",
        description="mean over all tokens of the optimiser batch, over sequences of their token means, or the sum over "
        "sequences times max_completion_tokens; not given: the algorithm's own",
    )
    clip_low: float | None = Field(0.2, ge=0, le=1, description="the ratio is clipped below at 1 - clip_low")
    clip_high: float | None = Field(0.2, ge=0, description="the ratio is clipped above at 1 + clip_high")
    dual_clip: float | None = Field(None, gt=1, description="loss ppo_clip: most ratio that a negative advantage sees")
    sapo_temperature_positive: float | None = Field(None, gt=0, description="loss sapo: where the advantage is above 0")
    sapo_temperature_negative: float | None = Field(None, gt=0, description="loss sapo: where it is 0 or below")
    kl_coef: float = Field(0.0, ge=0, description="weight of the KL to the reference; 0 loads no reference")
    kl_in: Literal["loss", "reward"] = Field(
        "loss", description="each token's KL is part of its loss, or a completion's sum is taken off its reward"
    )
    kl_estimator: Literal["k1", "k2", "k3"] = Field("k3", description="not given: k3 in the loss, k1 in the reward")
    reference_sync_every: int = Field(
        0, ge=0, description="training steps after which the reference moves towards the policy; 0 keeps it frozen"
    )
    reference_mixup: float | None = Field(
        None, gt=0, le=1, description="the reference becomes mixup x policy + (1 - mixup) x reference"
    )
    entropy_coef: float = Field(
        0.0, ge=0, description="weight of the entropy bonus; with entropy_target, the first one"
    )
    entropy_target: float | None = Field(
        None, gt=0, description="nats; the weight rises while entropy is below, falls while above; none keeps it fixed"
    )
    entropy_coef_step: float | None = Field(None, gt=0, description="by how much the weight rises or falls in a step")
    entropy_coef_min: float | None = Field(None, ge=0)
    entropy_coef_max: float | None = Field(None, gt=0)
    top_entropy_fraction: float = Field(
        1.0, gt=0, le=1, description="this part of each completion's tokens, those of most entropy, has a policy loss"
    )
    router_aux_loss_coef: float = Field(
        0.0,
        ge=0,
        description="weight of a mixture of experts' balance loss, over the loss tokens of the whole optimiser batch; "
        "counting takes one more forward",
    )
    overlong: Literal["keep", "mask"] = Field(
        "keep", description="mask: a completion cut at max_completion_tokens shapes the baseline, but has no loss"
    )
    old_logprobs: Literal["auto", "sampler", "policy"] = Field(
        "auto",
        description="log-probs that ratios start from: the sampler's, or the policy's own, from one more forward; auto "
        "is the sampler's where they are exact: the native engine",
    )
    correction: Literal["none", "truncate", "mask", "decoupled"] = Field(
        "none", description="weight by policy over sampler: cut at correction_high, 0 out of bounds, or as it is"
    )
    correction_level: Literal["token", "sequence", "geometric"] | None = Field(
        None, description="the weight is a token's, the product over its completion, or that product's geometric mean"
    )
    correction_low: float | None = Field(None, ge=0, description="correction mask: weights below become 0")
    correction_high: float | None = Field(None, gt=0, description="weights above are cut (truncate) or become 0 (mask)")
    correction_veto: float | None = Field(
        None, gt=0, lt=1, description="a completion with a token of lower policy-over-sampler ratio is left out"
    )
    off_policy_mask: float | None = Field(
        None, gt=0, description="a completion of negative advantage and more mean log(sampler / policy) is left out"
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_from_recipe(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        # None is what a resolved config holds for keys that do not act, so it reads as not given.
        conditional = _conditional_keys()
        chosen = {key: value for key, value in given.items() if value is not None or key not in conditional}
        recipe = RECIPES.get(str(chosen.get("name", "grpo")))
        if recipe is None:
            return chosen
        parts = {"advantage": recipe.advantage, "loss": recipe.loss, "correction": "none", "kl_in": "loss", **chosen}
        defaults: dict[str, Any] = dict.fromkeys(conditional)
        for part_key, table in PART_SETTINGS.items():
            defaults.update(table.get(str(parts[part_key]), {}))
        if parts["loss"] in SEQUENCE_LOSSES and parts["correction"] != "none":
            defaults["correction_level"] = "sequence"
        for switch, dependents in SWITCHED_SETTINGS.items():
            if chosen.get(switch):
                defaults.update(dependents)
        # A recipe's numbers belong to its own parts: DAPO's clip must not reach a GSPO loss chosen beside its name.
        defaults.update({key: value for key, value in recipe.settings.items() if _comes_with(key, recipe, parts)})
        return {"normaliser": recipe.normaliser, **defaults, **parts}


PART_SETTINGS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "advantage": ADVANTAGE_SETTINGS,
    "loss": LOSS_SETTINGS,
    "correction": CORRECTION_SETTINGS,
    "kl_in": KL_SETTINGS,
}
"""Every key that names a part, and what its parts take."""


def _conditional_keys() -> list[str]:
    tables = [*PART_SETTINGS.values(), SWITCHED_SETTINGS]
    return sorted({key for table in tables for settings in table.values() for key in settings})


def _comes_with(key: str, recipe: AlgorithmRecipe, parts: Mapping[str, Any]) -> bool:
    own = {"advantage": recipe.advantage, "loss": recipe.loss}
    return any(key in PART_SETTINGS[part_key][part] and parts[part_key] == part for part_key, part in own.items())
