"""One reward: a function, its weight, and what happens when it fails."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from groupwise.config.base import Section


class RewardConfig(Section):
    name: str = Field(description="a built-in reward, `module:function`, or `path/to/file.py:function`")
    weight: float = Field(1.0, description="factor in the weighted sum")
    data_source: tuple[str, ...] = Field((), description="rows that it scores; empty means all")
    args: dict[str, Any] = Field(
        {},
        description='keyword arguments of its own; `"env:NAME"` is what an environment variable holds',
    )
    timeout: float = Field(60.0, gt=0, description="seconds that one call may take")
    on_error: Literal["fail", "zero", "stop"] = Field(
        "fail", description="fail marks the rollouts as failed, zero scores them 0, stop ends the run"
    )
    isolated: bool | Literal["auto", "main"] = Field(
        "auto",
        description="where it runs: false is a thread, true the main thread of a process of its own, main the "
        "trainer's own thread; auto is a thread until a call turns out to need a main thread, then a process",
    )
