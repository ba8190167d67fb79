"""The load of experts: counts are merged first, and statistics are taken of their sums."""

from __future__ import annotations

import math

import pytest

from groupwise.metrics import Load, merge, resolve


def test_statistics_are_of_merged_counts() -> None:
    parts = [((4, 0, 0, 0), (1, 1, 1, 1)), ((0, 4, 0, 0), (1, 1, 1, 1))]
    for name, wanted in (("max_load", 2.0), ("dead", 2 / 8), ("entropy", (math.log(2) + math.log(4)) / 2)):
        one, other = ({"moe": Load(part, name)} for part in parts)  # type: ignore[arg-type]
        assert resolve(merge(one, other))["moe"] == pytest.approx(wanted)
    assert Load(parts[0], "max_load").value == 4.0
    assert Load(parts[0], "dead").value == 3 / 8


def test_layers_without_a_token_say_nothing() -> None:
    assert math.isnan(Load(((0, 0), (0, 0)), "dead").value)
    assert Load(((0, 0), (1, 0)), "dead").value == 0.5
