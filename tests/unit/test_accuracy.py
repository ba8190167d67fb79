"""pass@k against enumeration, intervals against published numbers and coverage by simulation."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from groupwise.accuracy import accuracy, confidence_interval, mean_pass_at_k, pass_at_k


@pytest.mark.parametrize("n", range(1, 7))
def test_pass_at_k_equals_enumeration_of_all_subsets(n: int) -> None:
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
        expected = sum(any(subset) for subset in subsets) / len(subsets)
        assert pass_at_k(n, c, k) == pytest.approx(expected, abs=1e-12), (n, c, k)


@pytest.mark.parametrize(("n", "c", "k"), [(3, 1, 4), (3, 1, 0), (0, 0, 1), (3, 4, 1), (3, -1, 1)])
def test_pass_at_k_refuses_what_has_no_estimate(n: int, c: int, k: int) -> None:
    with pytest.raises(ValueError, match=r"pass@k|num_correct"):
        pass_at_k(n, c, k)


def test_pass_at_k_is_exact_for_many_samples() -> None:
    assert pass_at_k(10_000, 1, 100) == pytest.approx(0.01, abs=1e-12)


@given(st.integers(1, 40).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))))
def test_pass_at_k_rises_with_k_and_starts_at_the_fraction(case: tuple[int, int]) -> None:
    n, c = case
    values = [pass_at_k(n, c, k) for k in range(1, n + 1)]
    assert values[0] == pytest.approx(c / n)
    assert all(a <= b + 1e-12 for a, b in itertools.pairwise(values))
    assert values[-1] == (1.0 if c else 0.0)


def test_accuracy_weights_rows_equally_whatever_their_samples() -> None:
    assert accuracy([[True], [False, False, False, True]]) == pytest.approx(0.625)
    assert mean_pass_at_k([[True, False], [False, False]], 2) == pytest.approx(0.5)


@pytest.mark.parametrize("outcomes", [[], [[]], [[True], []]])
def test_no_rows_or_no_samples_is_an_error(outcomes: list[list[bool]]) -> None:
    for function in (accuracy, confidence_interval, lambda o: mean_pass_at_k(o, 1)):
        with pytest.raises(ValueError, match="row"):
            function(outcomes)


def test_wilson_equals_published_numbers() -> None:
    # Newcombe 1998, table I, method 3 (score without continuity correction).
    for correct, n, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)):
        interval = confidence_interval([[i < correct] for i in range(n)])
        assert interval.low == pytest.approx(low, abs=5e-5)
        assert interval.high == pytest.approx(high, abs=5e-5)


def test_several_samples_use_the_spread_between_rows() -> None:
    # Row means 1, 0, 1, 0: standard error sqrt(1/3 / 4), although there are 40 samples.
    interval = confidence_interval([[True] * 10, [False] * 10] * 2)
    assert interval.low == 0.0  # clipped: 0.5 - 1.96 * 0.2887 = -0.066
    assert interval.high == 1.0
    interval = confidence_interval([[True] * 10, [False] * 10] * 50)
    assert interval.high - interval.low == pytest.approx(2 * 1.959964 * (100 / 4 / 99 / 100) ** 0.5, rel=1e-6)


def test_equal_rows_do_not_give_certainty() -> None:
    for outcomes in ([[True] * 4] * 10, [[True, True]], [[True, False]] * 10):
        interval = confidence_interval(outcomes)
        assert interval.high - interval.low > 0.2
        assert 0.0 <= interval.low <= accuracy(outcomes) <= interval.high <= 1.0


def test_clustered_interval_covers_the_truth_about_95_percent_of_the_time() -> None:
    rng, covered, trials = random.Random(0), 0, 400
    for _ in range(trials):
        skills = [rng.choice((0.1, 0.9)) for _ in range(60)]
        interval = confidence_interval([[rng.random() < skill for _ in range(4)] for skill in skills])
        covered += interval.low <= 0.5 <= interval.high
    assert 0.91 <= covered / trials <= 0.985


@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=5), min_size=1, max_size=20))
def test_interval_always_holds_the_accuracy(outcomes: list[list[bool]]) -> None:
    interval = confidence_interval(outcomes)
    assert 0.0 <= interval.low <= accuracy(outcomes) <= interval.high <= 1.0
