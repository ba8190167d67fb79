"""The algorithm: a name, and parts that each have their own settings: advantage, loss, KL, entropy, correction,
teacher.

The name is a recipe, which is nothing but parts: one that is not given is the recipe's. A part takes the settings of
its class alone, so the resolved config shows every number that acts. A new loss or advantage is one class in its file
here; a new kind of part is one file, and one field below.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from groupwise.config.algorithm.advantages import Advantage, Grpo
from groupwise.config.algorithm.corrections import Correction, NoCorrection
from groupwise.config.algorithm.entropy import AdaptiveEntropy, Entropy, FixedEntropy
from groupwise.config.algorithm.kl import FrozenReference, Kl, KlInLoss, MovingReference, Reference
from groupwise.config.algorithm.losses import Loss, LossSettings, PpoClip
from groupwise.config.algorithm.recipes import RECIPES, AlgorithmRecipe, Normaliser
from groupwise.config.algorithm.teacher import NoTeacher, Teacher, TeacherPart
from groupwise.config.base import Section, Variant, refusal
from groupwise.config.renamed import clash, of_today
from groupwise.errors import nearest

logger = logging.getLogger(__name__)

__all__ = ["RECIPES", "AdaptiveEntropy", "AlgorithmConfig", "AlgorithmRecipe", "MovingReference", "Teacher"]


class AlgorithmConfig(Section):
    name: str = Field(default="grpo", description="`groupwise algorithms` lists them")
    normaliser: Normaliser = Field(
        "token",
        description="mean over all tokens of the optimiser batch, over sequences of their token means, or the sum over "
        "sequences times max_completion_tokens; not given: the algorithm's own",
    )
    overlong: Literal["keep", "mask"] = Field(
        default="keep",
        description="mask: a completion cut at max_completion_tokens shapes the baseline, but has no loss",
    )
    old_logprobs: Literal["auto", "sampler", "policy"] = Field(
        "auto",
        description="log-probs that ratios start from: the sampler's, or the policy's own, from one more forward; auto "
        "is the sampler's where they are exact: the native engine",
    )
    router_aux_loss_coef: float = Field(
        0.0,
        ge=0,
        description="weight of a mixture of experts' balance loss, over the loss tokens of the whole optimiser batch; "
        "counting takes one more forward",
    )
    advantage: Advantage = Grpo()
    loss: Loss = PpoClip()
    kl: Kl = KlInLoss()
    reference: Reference = FrozenReference()
    entropy: Entropy = FixedEntropy()
    correction: Correction = NoCorrection()
    teacher: TeacherPart = NoTeacher()

    @model_validator(mode="before")
    @classmethod
    def _fill_from_recipe(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        given = _in_names_of_today(given)
        recipe = RECIPES.get(str(given.get("name")), RECIPES["grpo"])
        own = {"advantage": recipe.advantage, "loss": recipe.loss, "kl": KlInLoss(), "correction": NoCorrection()}
        # A part that is not given stays an object on which nothing is set: a run may choose another for its engine.
        parts = {key: _completed(given[key], part) if key in given else part for key, part in own.items()}
        if _name_of(parts["loss"]) in _PER_COMPLETION and _name_of(parts["correction"]) not in ("none", ""):
            parts["correction"] = {"level": "sequence", **dict(parts["correction"])}
        return {"normaliser": recipe.normaliser, **given, **parts}

    @field_validator("name")
    @classmethod
    def _is_known(cls, name: str) -> str:
        if name not in RECIPES:
            hint = nearest(name, RECIPES, "did you mean {!r}? ")
            raise ValueError(f"got {name!r}, which does not exist; {hint}expected one of {', '.join(sorted(RECIPES))}")
        return name

    @model_validator(mode="after")
    def _parts_go_together(self) -> AlgorithmConfig:
        """Refuse what would not act beside another part, or mean something else."""
        if self.kl.coef == 0 and self.kl.place != "loss":
            raise refusal("kl.place", f"got {self.kl.place!r}, which has no effect with {_NO_KL}")
        if self.kl.coef == 0 and self.reference.sync_every:
            raise refusal("reference.sync_every", f"got {self.reference.sync_every}, which has no effect with {_NO_KL}")
        if self.kl.place == "reward" and self.advantage.no_kl_in_reward:
            raise refusal(
                "kl.place",
                f"got 'reward', which does not go with advantage.name = {self.advantage.name!r}: it "
                f"{self.advantage.no_kl_in_reward}; use 'loss'",
            )
        self._teacher_goes_with_the_others()
        if not self.loss.per_completion:
            return self
        if self.correction.name != "none" and self.correction.level == "token":
            raise refusal(
                "correction.level",
                f"got 'token', which does not go with loss.name = {self.loss.name!r}: its ratio is the completion's, "
                "and a weight of each token's would not correct it; use 'sequence' or 'geometric'",
            )
        if self.entropy.top_fraction < 1:
            raise refusal(
                "entropy.top_fraction",
                f"got {self.entropy.top_fraction}, which does not go with loss.name = {self.loss.name!r}: every token "
                "of a completion has the same loss, so leaving tokens out would only scale it; set it to 1",
            )
        return self

    def _teacher_goes_with_the_others(self) -> None:
        if not isinstance(self.teacher, Teacher):
            if self.advantage.name == "none":
                raise refusal("advantage.name", "got 'none', so nothing is learned; set teacher.path to a model")
            return
        if self.loss.per_completion:
            raise refusal(
                "teacher.path",
                f"a teacher's credit differs from token to token, and loss.name = {self.loss.name!r} has one ratio per "
                "completion; use 'gspo_token', or a loss of tokens",
            )
        if getattr(self.correction, "off_policy_mask", None) is not None:
            raise refusal(
                "correction.off_policy_mask",
                "it asks for the sign of a completion's advantage, and with teacher.path that differs from token to "
                "token; leave out one or the other",
            )


_NO_KL = "kl.coef = 0, which has no reference; remove it, or set kl.coef"
_PER_COMPLETION = {one.choice for one in LossSettings.__subclasses__() if one.per_completion}


def _in_names_of_today(given: Mapping[str, Any]) -> Mapping[str, Any]:
    renaming = of_today({"algorithm": given})
    for old in renaming.clashes:
        raise refusal(old.removeprefix("algorithm."), clash(old))
    if renaming.named:
        logger.warning("%s", renaming.remark)
    return renaming.values["algorithm"]


def _completed(given: Any, part: Variant) -> Any:
    """The settings as given, and the rest of `part` if it is the part that is meant: DAPO's clip must not reach a GSPO
    loss that is chosen beside its name."""
    if not isinstance(given, Mapping) or given.get(part.chosen_by, part.choice) != part.choice:
        return given
    return {**dict(part), **given}


def _name_of(part: Any) -> str:
    """Of what may turn out to be no part."""
    return str(dict(part).get("name", "")) if isinstance(part, Mapping | Variant) else ""
