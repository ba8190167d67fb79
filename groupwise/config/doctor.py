"""What the doctor finds worth saying; see docs/doctor.md."""

from __future__ import annotations

from pydantic import Field

from groupwise.config.base import Section


class DoctorConfig(Section):
    ignore: tuple[str, ...] = Field((), description="rules that do not look")
    flat_steps: int = Field(50, ge=10, description="reward_flat: steps without a rise of the mean reward")
    equal_share: float = Field(
        0.7, gt=0, le=1, description="groups_equal: share of groups with equal rewards, over five steps"
    )
    max_kl: float = Field(0.5, gt=0, description="kl_high: most nats per token from the reference, over three steps")
    min_entropy: float = Field(0.01, ge=0, description="entropy_collapse: least nats per token, over five steps")
    max_mismatch: float = Field(
        0.05,
        gt=0,
        description="mismatch_high: most nats per token between sampler and trainer, mean of absolute differences over "
        "three steps",
    )
