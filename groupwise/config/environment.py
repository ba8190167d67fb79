"""What answers a model's turns; without a name every episode is one turn."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from groupwise.config.base import Section


class EnvironmentConfig(Section):
    name: str | None = Field(
        None,
        description="a built-in environment (`calculator`), `module:factory`, or `path/to/file.py:factory`; none is "
        "one turn",
    )
    args: dict[str, Any] = Field({}, description="keyword arguments of the factory")
    max_turns: int = Field(8, ge=1, description="most turns of the model in one episode")
    timeout: float = Field(60.0, gt=0, description="seconds that one call of the environment may take")
    weight: float = Field(1.0, description="factor of what the environment gives, in the weighted sum of rewards")
