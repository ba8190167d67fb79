"""Engines: prompts in, completions out, behind one protocol (`groupwise.types.Engine`). Adapters are loaded by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from groupwise.errors import ConfigError, nearest

if TYPE_CHECKING:
    from groupwise.config import RolloutConfig
    from groupwise.model.loading import LoadedModel
    from groupwise.types import Engine

ENGINES = ("native",)


def build_engine(config: RolloutConfig, loaded: LoadedModel, *, reserved_bytes: int = 0) -> Engine:
    """The engine that `rollout.engine` names.

    Args:
        reserved_bytes: GPU memory that is free now and that training will take.

    Raises:
        ConfigError: no such engine.
    """
    check_engine(config.engine)
    from groupwise.engines.native import NativeEngine

    return NativeEngine(loaded, config, reserved_bytes=reserved_bytes)


def check_engine(name: str) -> None:
    """Refuse an unknown name before anything is loaded."""
    if name not in ENGINES:
        hint = nearest(name, ENGINES, "did you mean {!r}? Known:") or "expected one of"
        raise ConfigError(f"rollout.engine = {name!r} is unknown; {hint} {', '.join(ENGINES)}")
