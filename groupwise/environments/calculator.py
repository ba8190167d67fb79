"""A calculator: the model writes `<<48/2>>`, and the result follows."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Sequence
from fractions import Fraction

from groupwise.inputs import SampleKey
from groupwise.types import Done, Message, Prompt, Reply, Segment

_LONGEST = 100
_LARGEST_POWER = 64
_MOST_BITS = 1024
_OPERATORS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: lambda left, right: left / right,
}


class Calculator:
    """Answers a turn that ends with `<<expression>>` with the expression's value, and `error` where it has none.

    Sums, differences, products, quotients, powers to a small whole number, and brackets, computed exactly; a value that
    is no whole number is written with up to six decimals.

    Example:
        "He has <<14+9>>" -> "23", after which the model goes on
    """

    stop = (">>",)

    async def begin(self, prompt: Prompt, key: SampleKey) -> Sequence[Message] | None:
        """Nothing to add to the prompt."""

    async def answer(self, turn: Segment) -> Reply | Done:
        """The value of the expression that the turn ends with; Done where it ends with none."""
        text = turn.text.rstrip()
        if not text.endswith(">>") or "<<" not in text:
            return Done()
        return Reply(text=calculate(text[:-2].rpartition("<<")[2]))

    async def close(self) -> None:
        """Nothing is held."""


def calculate(expression: str) -> str:
    """The value as text, or `error`.

    Example:
        calculate("7/2") == "3.5"
    """
    try:
        if len(expression) > _LONGEST:
            return "error"
        value = _value(ast.parse(expression.strip(), mode="eval").body)
        return str(value) if value.denominator == 1 else f"{float(value):.6f}".rstrip("0")
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError):
        return "error"


def _value(node: ast.expr) -> Fraction:
    value = _computed(node)
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > _MOST_BITS:
        raise ValueError("too large")
    return value


def _computed(node: ast.expr) -> Fraction:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return Fraction(str(node.value))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand)
    if isinstance(node, ast.BinOp):
        left, right = _value(node.left), _value(node.right)
        if type(node.op) in _OPERATORS:
            return _OPERATORS[type(node.op)](left, right)
        if isinstance(node.op, ast.Pow) and right.denominator == 1 and abs(right) <= _LARGEST_POWER:
            return left ** int(right)
    raise ValueError("not an expression of numbers")
