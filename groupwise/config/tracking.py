"""Where metrics go."""

from __future__ import annotations

from pydantic import Field

from groupwise.config.base import Section


class TrackingConfig(Section):
    backends: tuple[str, ...] = Field(("console", "jsonl", "tensorboard"), description="console, jsonl, tensorboard")
    project: str = Field("groupwise")
    run_name: str | None = Field(None, description="none is the run directory's name")
