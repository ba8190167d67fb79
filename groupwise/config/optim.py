"""The optimiser and its schedule."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from groupwise.config.base import Section


class OptimConfig(Section):
    name: Literal["adamw"] = Field("adamw")
    lr: float = Field(1e-6, gt=0)
    betas: tuple[float, float] = Field((0.9, 0.999))
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0, description="decoupled; biases and norms are never decayed")
    schedule: Literal["constant", "linear", "cosine"] = Field("constant")
    warmup_ratio: float = Field(0.0, ge=0, lt=1, description="part of all optimiser steps in which lr rises from 0")
    min_lr_ratio: float = Field(0.0, ge=0, le=1, description="where linear and cosine end, as a part of lr")
    max_grad_norm: float = Field(1.0, ge=0, description="0 turns clipping off")
    steps_per_batch: int = Field(1, ge=1, description="optimiser steps made of one batch, each on its share of it")
