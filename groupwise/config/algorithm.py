"""The algorithm: advantages, policy loss, KL."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from groupwise.config.base import Section


class AlgorithmConfig(Section):
    name: str = Field("grpo", description="`groupwise algorithms` lists them")
    clip_low: float = Field(0.2, ge=0, le=1, description="the ratio is clipped below at 1 - clip_low")
    clip_high: float = Field(0.2, ge=0, description="the ratio is clipped above at 1 + clip_high")
    kl_coef: float = Field(0.0, ge=0, description="weight of the KL to the reference; 0 loads no reference")
    kl_estimator: Literal["k1", "k2", "k3"] = Field("k3")
