"""The optimiser and its schedule."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from groupwise.config.base import Section


class OptimConfig(Section):
    name: Literal["adamw", "adamw_8bit", "muon"] = Field(
        "adamw",
        description="adamw_8bit keeps moments in 8 bits and needs bitsandbytes; muon trains the matrices between "
        "embedding and head, and AdamW the rest",
    )
    lr: float = Field(1e-6, gt=0)
    betas: tuple[float, float] = Field((0.9, 0.999))
    eps: float = Field(1e-8, gt=0)
    momentum: float = Field(0.95, ge=0, lt=1, description="of muon")
    weight_decay: float = Field(0.0, ge=0, description="decoupled; of all matrices: biases and norms have none")
    weight_decay_groups: dict[str, float] = Field(
        {}, description='other values by parameter name, first match wins: {"*embed_tokens*" = 0.0, "*norm*" = 0.1}'
    )
    schedule: Literal["constant", "linear", "cosine"] = Field("constant")
    warmup_ratio: float = Field(0.0, ge=0, lt=1, description="part of all optimiser steps in which lr rises from 0")
    warmup_steps: int = Field(0, ge=0, description="optimiser steps in which lr rises from 0, instead of a part of all")
    min_lr_ratio: float = Field(0.0, ge=0, le=1, description="where linear and cosine end, as a part of lr")
    max_grad_norm: float = Field(1.0, ge=0, description="0 turns clipping off")
    steps_per_batch: int = Field(1, ge=1, description="optimiser steps made of one batch, each on its share of it")
    passes_per_batch: int = Field(1, ge=1, description="times that one batch is learned, each in steps_per_batch steps")

    @property
    def updates_per_batch(self) -> int:
        """Optimiser steps in one training step."""
        return self.steps_per_batch * self.passes_per_batch

    @field_validator("weight_decay_groups")
    @classmethod
    def _not_negative(cls, groups: dict[str, float]) -> dict[str, float]:
        for pattern, value in groups.items():
            if value < 0:
                raise ValueError(f"the weight decay of {pattern!r} is {value}; expected 0 or more")
        return groups

    @model_validator(mode="after")
    def _one_warm_up(self) -> OptimConfig:
        if self.warmup_steps and self.warmup_ratio:
            raise ValueError(
                f"warmup_steps = {self.warmup_steps} and warmup_ratio = {self.warmup_ratio} both say how long the rate "
                "rises; set one of them to 0"
            )
        return self
