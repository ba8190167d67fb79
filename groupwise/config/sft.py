"""Supervised warm-up by `groupwise sft`; the other sections mean the same as in GRPO training."""

from __future__ import annotations

from pydantic import Field

from groupwise.config.base import Section


class SftConfig(Section):
    rows_per_step: int = Field(32, ge=1, description="conversations in one optimiser step")
    text_column: str | None = Field(
        None, description="learn whole texts, from their second token on, instead of answers: the column that has them"
    )
    max_tokens: int = Field(2048, ge=2, description="longer conversations are left out and counted, never cut")
