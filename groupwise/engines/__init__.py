"""Engines: prompts in, completions out, behind one Protocol (`groupwise/protocols.py`); loaded by name."""

from groupwise.engines.checks import (
    ENGINES,
    check_engine,
    check_logprobs,
    check_weights,
    has_logprobs,
    is_exact,
    refuse_launch,
    require_client,
    require_server,
)
from groupwise.engines.tellings import check_told

__all__ = [
    "ENGINES",
    "check_engine",
    "check_logprobs",
    "check_told",
    "check_weights",
    "has_logprobs",
    "is_exact",
    "refuse_launch",
    "require_client",
    "require_server",
]
