"""The entropy bonus, and which tokens have a policy loss by their entropy."""

from __future__ import annotations

from typing import Annotated, ClassVar, TypeAlias

from pydantic import Discriminator, Field, Tag, model_validator

from groupwise.config.base import Variant, refusal, switched

Coef: TypeAlias = Annotated[float, Field(ge=0, description="weight of the entropy bonus; with a target, the first one")]
TopFraction: TypeAlias = Annotated[
    float,
    Field(
        gt=0,
        le=1,
        description="this part of each completion's tokens, those of most entropy, has a policy loss",
    ),
]


class EntropySettings(Variant):
    chosen_by: ClassVar[str] = "target"


class FixedEntropy(EntropySettings):
    choice: ClassVar[str] = "none"
    coef: Coef = 0.0
    target: None = Field(
        default=None,
        description="nats; the weight rises while entropy is below, falls while above; none keeps it fixed",
    )
    top_fraction: TopFraction = 1.0


class AdaptiveEntropy(EntropySettings):
    choice: ClassVar[str] = "a number"
    coef: Coef = 0.0
    target: float = Field(gt=0)
    coef_step: float = Field(default=0.005, gt=0, description="by how much the weight rises or falls in a step")
    coef_min: float = Field(default=0.0, ge=0, description="the least weight")
    coef_max: float = Field(default=1.0, gt=0, description="the largest weight")
    top_fraction: TopFraction = 1.0

    @model_validator(mode="after")
    def _start_is_within_the_range(self) -> AdaptiveEntropy:
        if not (self.coef_min < self.coef_max and self.coef_min <= self.coef <= self.coef_max):
            raise refusal(
                "target",
                f"it moves coef between coef_min = {self.coef_min} and coef_max = {self.coef_max}, and starts at coef "
                f"= {self.coef}; give a range, and a start within it",
            )
        return self


Entropy: TypeAlias = Annotated[
    Annotated[FixedEntropy, Tag(FixedEntropy.choice)] | Annotated[AdaptiveEntropy, Tag(AdaptiveEntropy.choice)],
    Discriminator(switched(FixedEntropy, AdaptiveEntropy)),
]
