"""What is done where the sampler's probabilities are not the policy's."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import Field, model_validator

from groupwise.config.base import Variant, refusal

Level: TypeAlias = Annotated[
    Literal["token", "sequence", "geometric"],
    Field(
        description="the weight is a token's, the product over its completion, or that product's geometric mean; not "
        "given: the sequence for a loss with one ratio per completion"
    ),
]
High: TypeAlias = Annotated[float, Field(gt=0, description="weights above are cut (truncate) or become 0 (mask)")]


Veto: TypeAlias = Annotated[
    float | None,
    Field(gt=0, lt=1, description="a completion with a token of lower policy-over-sampler ratio is left out"),
]
OffPolicyMask: TypeAlias = Annotated[
    float | None,
    Field(gt=0, description="a completion of negative advantage and more mean log(sampler / policy) is left out"),
]


class CorrectionSettings(Variant):
    """A weight; two masks act beside any, and alone."""


class NoCorrection(CorrectionSettings):
    name: Literal["none"] = Field(
        default="none", description="weight by policy over sampler: cut at high, 0 out of bounds, or as it is"
    )
    veto: Veto = None
    off_policy_mask: OffPolicyMask = None


class Truncate(CorrectionSettings):
    name: Literal["truncate"] = "truncate"
    level: Level = "token"
    high: High = 2.0
    veto: Veto = None
    off_policy_mask: OffPolicyMask = None


class Mask(CorrectionSettings):
    name: Literal["mask"] = "mask"
    level: Level = "token"
    low: float = Field(default=0.5, ge=0, description="weights below become 0")
    high: High = 5.0
    veto: Veto = None
    off_policy_mask: OffPolicyMask = None

    @model_validator(mode="after")
    def _bounds_are_in_order(self) -> Mask:
        if self.low >= self.high:
            raise refusal("low", f"{self.low} is not below high = {self.high}; lower the first")
        return self


class Decoupled(CorrectionSettings):
    name: Literal["decoupled"] = "decoupled"
    level: Level = "token"
    veto: Veto = None
    off_policy_mask: OffPolicyMask = None


Correction: TypeAlias = Annotated[NoCorrection | Truncate | Mask | Decoupled, Field(discriminator="name")]
