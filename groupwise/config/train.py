"""The run: how long, where to, how often saved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field, model_validator

from groupwise.config.base import Section
from groupwise.config.doctor import DoctorConfig


class TrainConfig(Section):
    output: str = Field("", description="run directory; empty is runs/<model>-<data>")
    steps: int | None = Field(None, ge=1, description="training steps; none is what `epochs` gives")
    epochs: float = Field(1.0, gt=0, description="passes over the data, when `steps` is not given")
    seed: int = Field(0, ge=0)
    micro_batch_tokens: int = Field(
        4_096,
        ge=1,
        description="most tokens in one forward and backward pass; a CPU computes two of a small model at once",
    )
    logprob_chunk_tokens: int = Field(1_024, ge=8, description="tokens whose logits exist at one time")
    save_every: int = Field(
        0, ge=0, description="steps between checkpoints, beside those by the clock; 0 saves at no count of steps"
    )
    save_every_minutes: float = Field(
        10.0,
        ge=0,
        description="a checkpoint after the first step and then whenever so much time has passed, less often where a "
        "save is slow; 0 saves by `save_every` alone, when interrupted and at the end",
    )
    keep_checkpoints: int = Field(2, ge=1)
    stop_after_empty_steps: int = Field(
        3,
        ge=0,
        description="end the run, as failed, after so many steps in a row without one usable sample; 0 never does",
    )
    stop_on: tuple[str, ...] = Field(
        (), description="rules of the doctor that end the run, as failed and with a checkpoint; docs/doctor.md has them"
    )
    keep_best: str | None = Field(
        None,
        description="a number of the evaluation, such as eval/accuracy; the checkpoint where it was highest is kept "
        "beyond keep_checkpoints, as RUN@best, and an evaluation that is better is saved at once; needs eval.every",
    )
    trajectories: bool = Field(True, description="write every rollout to trajectories/")
    doctor: DoctorConfig = DoctorConfig()  # type: ignore[call-arg]

    @model_validator(mode="before")
    @classmethod
    def _forget_settings_of_earlier_versions(cls, given: Any) -> Any:
        """`max_off_policy_steps` could only be 0, so a recipe or a run that says so means what it meant."""
        if isinstance(given, Mapping) and given.get("max_off_policy_steps", 1) == 0:
            return {name: value for name, value in given.items() if name != "max_off_policy_steps"}
        return given
