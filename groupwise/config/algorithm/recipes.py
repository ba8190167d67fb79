"""The names that `algorithm.name` takes: each stands for parts, with their settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Literal, TypeAlias

from groupwise.config.algorithm import advantages, losses

Normaliser: TypeAlias = Literal["token", "sequence", "constant"]


_ADVANTAGE, _LOSS = advantages.Grpo(), losses.PpoClip()


@dataclass(frozen=True, slots=True)
class AlgorithmRecipe:
    """What a name stands for.

    Attributes:
        paper: where it was published.
        summary: one line for people.
        advantage, loss: its parts, with the numbers in which it differs from their defaults.

    Example:
        AlgorithmRecipe("dapo", "arXiv:2503.14476", summary="a higher upper clip", loss=PpoClip(clip_high=0.28))
    """

    name: str
    paper: str
    _: KW_ONLY
    summary: str
    advantage: advantages.Advantage = _ADVANTAGE
    loss: losses.Loss = _LOSS
    normaliser: Normaliser = "token"


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
            advantage=advantages.Grpo(scale="none"),
        ),
        AlgorithmRecipe(
            "dapo",
            "arXiv:2503.14476",
            summary="grpo with a higher upper clip, against entropy collapse",
            loss=losses.PpoClip(clip_high=0.28),
        ),
        AlgorithmRecipe(
            "bnpo", "arXiv:2402.03300", summary="token mean over a batch; over the optimiser batch it is grpo's loss"
        ),
        AlgorithmRecipe(
            "gspo",
            "arXiv:2507.18071",
            summary="one ratio per completion, for mixtures of experts and long answers",
            loss=losses.Gspo(),
            normaliser="sequence",
        ),
        AlgorithmRecipe(
            "gspo_token",
            "arXiv:2507.18071",
            summary="gspo whose advantage may differ from token to token",
            loss=losses.GspoToken(),
            normaliser="sequence",
        ),
        AlgorithmRecipe(
            "cispo",
            "arXiv:2506.13585",
            summary="clips the weight, not the gradient, so no token is lost",
            loss=losses.Cispo(),
        ),
        AlgorithmRecipe(
            "sapo",
            "arXiv:2511.20347",
            summary="a soft gate in place of the clip",
            loss=losses.Sapo(),
            normaliser="sequence",
        ),
        AlgorithmRecipe(
            "gmpo",
            "arXiv:2507.20673",
            summary="the geometric mean of clipped token ratios, robust to outlier tokens",
            loss=losses.Gmpo(),
            normaliser="sequence",
        ),
        AlgorithmRecipe(
            "reinforce_pp",
            "arXiv:2501.03262",
            summary="rewards whitened over the batch, without a baseline per prompt",
            advantage=advantages.ReinforcePp(),
        ),
        AlgorithmRecipe(
            "reinforce_pp_baseline",
            "arXiv:2501.03262",
            summary="rewards less the group's mean, whitened over the batch",
            advantage=advantages.ReinforcePpBaseline(),
        ),
        AlgorithmRecipe(
            "rloo",
            "arXiv:2402.14740",
            summary="leave-one-out baseline and plain policy gradient",
            advantage=advantages.Rloo(),
            loss=losses.Reinforce(),
            normaliser="constant",
        ),
        AlgorithmRecipe(
            "opo",
            "arXiv:2505.23585",
            summary="the length-weighted baseline of least variance and plain policy gradient",
            advantage=advantages.Opo(),
            loss=losses.Reinforce(),
            normaliser="constant",
        ),
        AlgorithmRecipe(
            "maxrl",
            "arXiv:2602.02710",
            summary="divides by the group's mean reward, so hard prompts weigh more",
            advantage=advantages.MaxRl(),
            loss=losses.Reinforce(),
            normaliser="constant",
        ),
        AlgorithmRecipe(
            "pass_k",
            "arXiv:2508.10751",
            summary="rewards at least one right answer in k, for exploration",
            advantage=advantages.PassK(),
        ),
        AlgorithmRecipe(
            "gdpo",
            "arXiv:2601.05242",
            summary="normalises each of several rewards before it sums them",
            advantage=advantages.Gdpo(),
        ),
        AlgorithmRecipe(
            "distill",
            "arXiv:2306.08543",
            summary="on-policy distillation: a teacher's log-probs are each token's credit",
            advantage=advantages.NoOutcome(),
            loss=losses.Reinforce(),
        ),
    )
}
