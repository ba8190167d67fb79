"""The policy losses; each has its own settings."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal, TypeAlias

from pydantic import Field

from groupwise.config.base import Variant

ClipLow: TypeAlias = Annotated[float, Field(ge=0, le=1, description="the ratio is clipped below at 1 - clip_low")]
ClipHigh: TypeAlias = Annotated[float, Field(ge=0, description="the ratio is clipped above at 1 + clip_high")]


class LossSettings(Variant):
    """What a policy loss takes, under the names of its function's arguments.

    Attributes:
        per_completion: it has one ratio per completion, so it has no tokens to weigh or to choose among.
    """

    per_completion: ClassVar[bool] = False


class PpoClip(LossSettings):
    name: Literal["ppo_clip"] = Field(default="ppo_clip", description="the policy loss; not given: the algorithm's own")
    clip_low: ClipLow = 0.2
    clip_high: ClipHigh = 0.2
    dual_clip: float | None = Field(default=None, gt=1, description="most ratio that a negative advantage sees")


class Gspo(LossSettings):
    name: Literal["gspo"] = "gspo"
    clip_low: ClipLow = 3e-4
    clip_high: ClipHigh = 4e-4
    per_completion: ClassVar[bool] = True


class GspoToken(LossSettings):
    name: Literal["gspo_token"] = "gspo_token"
    clip_low: ClipLow = 3e-4
    clip_high: ClipHigh = 4e-4


class Cispo(LossSettings):
    name: Literal["cispo"] = "cispo"
    clip_low: ClipLow = 1.0
    clip_high: ClipHigh = 4.0


class Sapo(LossSettings):
    name: Literal["sapo"] = "sapo"
    temperature_positive: float = Field(default=1.0, gt=0, description="where the advantage is above 0")
    temperature_negative: float = Field(default=1.05, gt=0, description="where it is 0 or below")


class Gmpo(LossSettings):
    name: Literal["gmpo"] = "gmpo"
    clip_low: ClipLow = 1 - math.exp(-0.4)
    clip_high: ClipHigh = math.exp(0.4) - 1
    per_completion: ClassVar[bool] = True


class Reinforce(LossSettings):
    name: Literal["reinforce"] = "reinforce"


Loss: TypeAlias = Annotated[PpoClip | Gspo | GspoToken | Cispo | Sapo | Gmpo | Reinforce, Field(discriminator="name")]
