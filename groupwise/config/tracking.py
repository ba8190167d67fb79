"""Where metrics go."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from groupwise.config.base import Section


class TrackingConfig(Section):
    backends: tuple[str, ...] = Field(
        ("console", "jsonl", "tensorboard"),
        description="any of console, jsonl, tensorboard, wandb, swanlab, trackio, mlflow",
    )
    project: str = Field("groupwise")
    run_name: str | None = Field(None, description="none is the run directory's name")
    mode: Literal["auto", "online", "local"] = Field(
        "auto", description="of wandb, swanlab, trackio and mlflow: auto is online where you are logged in"
    )
    folder: str | None = Field(
        None, description="for the local files of wandb, swanlab and mlflow; none is `tracking` in the run directory"
    )
    samples_every: int = Field(0, ge=0, description="steps between tables of sampled completions; 0 makes none")
    samples: int = Field(8, ge=1, description="completions in one table")

    @field_validator("backends", mode="before")
    @classmethod
    def _one_name_is_a_list_of_one(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value
