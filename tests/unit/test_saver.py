from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from groupwise.checkpoint import list_checkpoints, step_of
from groupwise.checkpoint.saver import Saver
from groupwise.config.train import TrainConfig


class Part:
    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass

    def at(self, step: int) -> Part:
        return self


@pytest.mark.parametrize(
    ("settings", "cost", "expected"),
    [
        ({}, 0, [1, 11, 21]),
        ({"save_every_minutes": 5}, 0, [1, 6, 11, 16, 21]),
        ({"save_every_minutes": 0}, 0, []),
        ({"save_every_minutes": 0, "save_every": 8}, 0, [8, 16, 24]),
        ({"save_every": 8}, 0, [1, 8, 16, 24]),
        # A save takes 36 s: at most a twentieth of the time is 19 times as long in between, 11.4 minutes.
        ({"save_every_minutes": 1}, 36, [1, 13]),
    ],
)
def test_the_cadence(tmp_path: Path, settings: dict[str, float], cost: float, expected: list[int]):
    """A step takes one minute."""
    now = [0.0]
    told: list[int] = []

    saver = Saver(
        tmp_path, {}, TrainConfig.model_validate({"keep_checkpoints": 99, **settings}),
        record=Part(), confirm=lambda: None, saved=told.append, clock=lambda: now[0],
    )  # fmt: skip

    for step in range(1, 25):
        now[0] += 60
        before = len(told)
        saver.after(step)
        if cost and len(told) > before:
            now[0] += cost
            saver._last, saver._seconds = now[0], cost
    assert told == expected
    assert [step_of(path) for path in list_checkpoints(tmp_path)] == expected
    saver.after(24, now=True)
    assert told[-1] == 24
