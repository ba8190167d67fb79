"""Evaluation during training and by `groupwise eval`."""

from __future__ import annotations

from pydantic import Field, field_validator

from groupwise.config.base import Section
from groupwise.config.temperature import temperature_problem


class EvalConfig(Section):
    every: int = Field(0, ge=0, description="training steps between evaluations; 0 never")
    at_start: bool = Field(True, description="also before the first step, when `every` is set")
    samples: int = Field(1, ge=1, description="completions per row; pass@k is reported for k = 1, 2, 4, … up to it")
    temperature: float = Field(0.0, ge=0, description="0 is greedy")
    top_p: float = Field(1.0, gt=0, le=1)
    max_completion_tokens: int | None = Field(None, ge=1, description="none is rollout.max_completion_tokens")
    limit: int | None = Field(None, ge=1, description="only the first rows")
    threshold: float = Field(0.0, description="a completion is correct when its first reward is above this")

    @field_validator("temperature")
    @classmethod
    def _acts(cls, value: float) -> float:
        if problem := temperature_problem(value):
            raise ValueError(problem)
        return value
