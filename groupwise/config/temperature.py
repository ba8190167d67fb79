"""The one rule for temperatures."""

from __future__ import annotations

COLDEST, HOTTEST = 1e-3, 100.0
"""Beyond these, sampling is greedy, or draws every token alike."""


def temperature_problem(value: float) -> str | None:
    """A temperature that is no other than greedy, or at which the model decides nothing."""
    if value == 0 or COLDEST <= value <= HOTTEST:
        return None
    return f"got {value:g}; expected 0, which is greedy, or {COLDEST:g} to {HOTTEST:g}; 1 is the model's own"
