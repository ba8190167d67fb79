"""The calculator: exact, bounded, and never an exception."""

from __future__ import annotations

import asyncio
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from groupwise.environments.calculator import Calculator, calculate
from groupwise.inputs import ModelInput
from groupwise.types import Done, Reply, Segment

NUMBERS = st.integers(-999, 999)


@st.composite
def expressions(draw: st.DrawFn, depth: int = 3) -> tuple[str, Fraction | None]:
    """A text, and its value; None where it divides by zero."""
    if depth == 0 or draw(st.booleans()):
        number = draw(NUMBERS)
        return f"({number})", Fraction(number)
    (left, a), (right, b) = draw(expressions(depth - 1)), draw(expressions(depth - 1))
    sign = draw(st.sampled_from("+-*/"))
    text = f"({left}{sign}{right})"
    if a is None or b is None or (sign == "/" and b == 0):
        return text, None
    return text, {"+": a + b, "-": a - b, "*": a * b, "/": a / b if b else a}[sign]


@given(expressions())
def test_it_reckons_as_fractions_do(case: tuple[str, Fraction | None]) -> None:
    text, value = case
    if len(text) > 100 or value is None:
        assert calculate(text) == "error"
    elif value.denominator == 1:
        assert calculate(text) == str(value)
    else:
        assert float(calculate(text)) == pytest.approx(float(value), abs=1e-6)


@given(st.text(max_size=120))
def test_nothing_that_a_model_writes_breaks_it(text: str) -> None:
    assert isinstance(calculate(text), str)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("48/2", "24"),
        ("7/2", "3.5"),
        ("0.1+0.2", "0.3"),
        (" 3 * (4 - 6) ", "-6"),
        ("2**10", "1024"),
        ("-3", "-3"),
        ("1/3", "0.333333"),
        ("1/0", "error"),
        ("9**9**9", "error"),
        ("((9**64)**64)**64", "error"),
        ("__import__('os')", "error"),
        ("True+1", "error"),
        ("", "error"),
        ("1" * 101, "error"),
        ("(" * 90, "error"),
    ],
)
def test_values(text: str, value: str) -> None:
    assert calculate(text) == value


@pytest.mark.parametrize(
    ("turn", "said"),
    [
        ("He has <<14+9>>", Reply(text="23")),
        ("<<1>> and <<2*3>> ", Reply(text="6")),
        ("#### 23", Done()),
        ("no opening >>", Done()),
        ("<<3+>>", Reply(text="error")),
    ],
)
def test_it_answers_the_call_that_a_turn_ends_with(turn: str, said: Reply | Done) -> None:
    segment = Segment("model", ModelInput.of((1,)), turn, (0.0,), (0,), finish_reason="stop")
    assert asyncio.run(Calculator().answer(segment)) == said
