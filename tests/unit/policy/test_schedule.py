"""Learning rates at the places that a reader of the settings would check, and what holds between them."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import get_scheduler

from groupwise.config import OptimConfig
from groupwise.policy.schedule import learning_rate


def optim(**settings: object) -> OptimConfig:
    return OptimConfig.model_validate({"lr": 0.5, **settings})


def rates(config: OptimConfig, total: int) -> list[float]:
    return [learning_rate(config, update, total) for update in range(total)]


def test_constant_without_warmup_is_lr_everywhere() -> None:
    assert rates(optim(), 5) == [0.5] * 5


def test_warmup_rises_in_equal_steps_to_lr() -> None:
    config = optim(warmup_ratio=0.4)
    assert rates(config, 10) == pytest.approx([0.125, 0.25, 0.375, 0.5] + [0.5] * 6)


def test_warmup_share_is_rounded_up() -> None:
    assert rates(optim(warmup_ratio=0.25), 5) == pytest.approx([0.25, 0.5, 0.5, 0.5, 0.5])


def test_no_update_has_rate_zero_in_warmup() -> None:
    assert learning_rate(optim(warmup_ratio=0.9), 0, 1000) > 0


def test_linear_is_half_way_down_in_the_middle() -> None:
    config = optim(schedule="linear", min_lr_ratio=0.2)
    assert learning_rate(config, 0, 10) == 0.5
    assert learning_rate(config, 5, 10) == pytest.approx(0.5 * (0.2 + 0.8 * 0.5))
    assert learning_rate(config, 10, 10) == pytest.approx(0.1)


def test_cosine_follows_half_a_cosine() -> None:
    config = optim(schedule="cosine", warmup_ratio=0.2)
    for update in range(2, 10):
        expected = 0.5 * 0.5 * (1 + math.cos(math.pi * (update - 2) / 8))
        assert learning_rate(config, update, 10) == pytest.approx(expected)
    assert learning_rate(config, 2, 10) == 0.5


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_beyond_the_end_the_rate_stays_at_its_minimum(schedule: str) -> None:
    config = optim(schedule=schedule, min_lr_ratio=0.1)
    assert learning_rate(config, 25, 10) == pytest.approx(0.05)


def test_one_update_in_all_learns() -> None:
    for schedule in ("constant", "linear", "cosine"):
        assert learning_rate(optim(schedule=schedule), 0, 1) == 0.5


@given(
    schedule=st.sampled_from(["constant", "linear", "cosine"]),
    warmup=st.floats(0, 0.99),
    floor=st.floats(0, 1),
    total=st.integers(1, 60),
)
def test_it_rises_then_falls_and_stays_in_bounds(schedule: str, warmup: float, floor: float, total: int) -> None:
    config = optim(schedule=schedule, warmup_ratio=warmup, min_lr_ratio=floor)
    found = rates(config, total)
    top = math.ceil(warmup * total)
    rising, falling = found[:top], found[top:]
    assert all(a < b for a, b in pairwise(rising))
    assert all(a >= b - 1e-12 for a, b in pairwise(falling))
    assert all(0 < rate <= 0.5 + 1e-12 for rate in rising)
    assert all(0.5 * floor - 1e-12 <= rate <= 0.5 + 1e-12 for rate in falling)
    if rising:
        assert rising[-1] == pytest.approx(0.5)


def test_warm_up_in_steps_does_not_depend_on_the_total() -> None:
    config = optim(warmup_steps=4, warmup_ratio=0.0)
    for total in (6, 1000):
        assert [learning_rate(config, update, total) for update in range(6)] == [0.125, 0.25, 0.375, 0.5, 0.5, 0.5]
    with pytest.raises(ValueError, match="both say how long the rate rises"):
        optim(warmup_steps=4, warmup_ratio=0.1)


@pytest.mark.parametrize("warmup", [0, 1, 3])
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_transformers_schedule_is_the_same_with_a_warm_up_one_update_later(schedule: str, warmup: int) -> None:
    name = "constant_with_warmup" if schedule == "constant" else schedule
    parameter = torch.nn.Parameter(torch.zeros(1))
    theirs = get_scheduler(name, torch.optim.SGD([parameter], lr=0.5), num_warmup_steps=warmup, num_training_steps=10)
    expected = []
    for _ in range(11):
        expected.append(theirs.get_last_lr()[0])
        theirs.optimizer.step()
        theirs.step()
    found = rates(optim(schedule=schedule, warmup_steps=warmup), 10)
    assert found[:warmup] == pytest.approx(expected[1 : warmup + 1], rel=1e-12)
    assert found[warmup:] == pytest.approx(expected[warmup:10], rel=1e-12)
    assert expected[0] == (0 if warmup else 0.5)
