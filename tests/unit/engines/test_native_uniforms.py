from __future__ import annotations

import numpy as np
import pytest

from groupwise.engines.native.uniforms import uniforms
from groupwise.inputs import SampleKey


def test_the_stream_is_pinned() -> None:
    """A change here changes every sample of every run that is to be repeated."""
    assert uniforms(0, SampleKey("train-000017-3fa9", 0, 0), 3).tolist() == [
        0.22200029275757382,
        0.5837804485429821,
        0.7648155989814477,
    ]
    assert uniforms(2**40, SampleKey("übung/日本", 0, 7), 3).tolist() == [
        0.10022584988227745,
        0.7248840767292013,
        0.43010229271863143,
    ]


def test_a_longer_stream_begins_with_the_shorter() -> None:
    assert np.array_equal(uniforms(1, SampleKey("a", 0, 2), 500)[:7], uniforms(1, SampleKey("a", 0, 2), 7))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((0, SampleKey("a", 0, 0)), (1, SampleKey("a", 0, 0))),
        ((0, SampleKey("a", 0, 0)), (0, SampleKey("b", 0, 0))),
        ((0, SampleKey("a", 0, 0)), (0, SampleKey("a", 0, 1))),
        ((0, SampleKey("a", 0, 0)), (0, SampleKey("a", 1, 0))),
        ((1, SampleKey("1", 0, 1)), (11, SampleKey("", 0, 11))),
    ],
)
def test_keys_do_not_collide(one: tuple[int, SampleKey], other: tuple[int, SampleKey]) -> None:
    assert not np.isin(uniforms(*one, 100), uniforms(*other, 100)).any()


def test_numbers_are_uniform_in_the_half_open_interval() -> None:
    numbers = np.concatenate([uniforms(0, SampleKey(f"p{i}", 0, 0), 1000) for i in range(50)])
    assert numbers.dtype == np.float64
    assert numbers.min() >= 0
    assert numbers.max() < 1
    counts, _ = np.histogram(numbers, bins=50, range=(0, 1))
    # 49 degrees of freedom: the 99.99th percentile is 98.
    assert ((counts - 1000) ** 2 / 1000).sum() < 98
    first = np.array([uniforms(0, SampleKey("p", 0, i), 2) for i in range(2000)])
    assert abs(np.corrcoef(first.T)[0, 1]) < 0.08
