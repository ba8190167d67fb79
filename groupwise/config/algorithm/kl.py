"""The KL to a reference, and whether that moves."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, TypeAlias

from pydantic import Discriminator, Field, Tag

from groupwise.config.base import Variant, switched

Coef: TypeAlias = Annotated[float, Field(ge=0, description="weight of the KL to the reference; 0 loads no reference")]
Estimator: TypeAlias = Annotated[
    Literal["k1", "k2", "k3"], Field(description="not given: k3 in the loss, k1 in the reward")
]


class KlSettings(Variant):
    chosen_by: ClassVar[str] = "place"


class KlInLoss(KlSettings):
    coef: Coef = 0.0
    place: Literal["loss"] = Field(
        default="loss", description="each token's KL is part of its loss, or a completion's sum is taken off its reward"
    )
    estimator: Estimator = "k3"


class KlInReward(KlSettings):
    coef: Coef = 0.0
    place: Literal["reward"] = "reward"
    estimator: Estimator = "k1"


Kl: TypeAlias = Annotated[KlInLoss | KlInReward, Field(discriminator="place")]


class ReferenceSettings(Variant):
    chosen_by: ClassVar[str] = "sync_every"


class FrozenReference(ReferenceSettings):
    choice: ClassVar[str] = "0"
    sync_every: int = Field(
        default=0,
        ge=0,
        le=0,
        description="training steps after which the reference moves towards the policy; 0 keeps it frozen",
    )


class MovingReference(ReferenceSettings):
    choice: ClassVar[str] = "1 or more"
    sync_every: int = Field(ge=1)
    mixup: float = Field(
        default=0.6, gt=0, le=1, description="the reference becomes mixup x policy + (1 - mixup) x reference"
    )


Reference: TypeAlias = Annotated[
    Annotated[FrozenReference, Tag(FrozenReference.choice)] | Annotated[MovingReference, Tag(MovingReference.choice)],
    Discriminator(switched(FrozenReference, MovingReference, "0", "0.0")),
]
