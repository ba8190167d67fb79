"""The tiny task: two-step word problems with small numbers, in the same row format as GSM8K.

Every file is a function of the seed and the counts. The warm-up rows (`sft.jsonl`) are like demonstrations from the
real world: most of those whose story ends by taking away make one slip, they add instead. A model that imitates them
learns the format, the procedure and the sums, and the slip too; reinforcement learning against the true answer then
takes the slip out. So the warm-up leaves a model that is often wrong and can be right, which is where RL has work.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from groupwise.errors import ConfigError
from groupwise.files import write_text_atomic

DATA_SOURCE = "groupwise/arithmetic"

SFT_FILE = "sft.jsonl"
TRAIN_FILE = "train.jsonl"
EVAL_FILE = "test.jsonl"

SLIP_SHARE = 0.65
"""Of the demonstrations whose last step subtracts, the share that adds instead."""

FIRST_NUMBERS = range(2, 21)
OTHER_NUMBERS = range(2, 10)


@dataclass(frozen=True, slots=True)
class Template:
    """A story of two steps.

    Attributes:
        text: with fields for name, pronoun (`They`), thing and the numbers a, b, c.
        signs: `+` or `-` of the first and of the second step.
    """

    text: str
    signs: str


TEMPLATES: tuple[Template, ...] = (
    Template("{name} has {a} {thing}. {They} buys {b} more and gives {c} away.", "+-"),
    Template("{name} gets {a} {thing} from a friend and {b} from a shop, then loses {c}.", "+-"),
    Template("{name} had {a} {thing} and found {b} more. A friend took {c}.", "+-"),
    Template("There are {a} {thing} in a box. {name} puts {b} in and takes {c} out.", "+-"),
    Template("{name} has {a} {thing}. {They} loses {b} and gives {c} away.", "--"),
    Template("{name} had {a} {thing}. {They} sold {b}, and a friend took {c}.", "--"),
    Template("There are {a} {thing} in a box. {name} takes {b} out, then another {c}.", "--"),
    Template("{name} has {a} {thing}. {They} buys {b} more and finds {c} more.", "++"),
    Template("{name} gets {a} {thing}, then {b} from a friend and {c} from a shop.", "++"),
    Template("{name} had {a} {thing}. {They} sold {b} and then found {c} more.", "-+"),
    Template("There are {a} {thing} in a box. {name} takes {b} out and puts {c} in.", "-+"),
)

QUESTION = "How many {thing} are there now?"


@dataclass(frozen=True, slots=True)
class Person:
    name: str
    pronoun: str


PEOPLE: tuple[Person, ...] = (
    Person("Tom", "He"),
    Person("Ben", "He"),
    Person("Sam", "He"),
    Person("Leo", "He"),
    Person("Anna", "She"),
    Person("Mia", "She"),
    Person("Zoe", "She"),
    Person("Eva", "She"),
)

THINGS: tuple[str, ...] = ("apples", "books", "coins", "pens", "cards", "shells", "cakes", "stamps")


@dataclass(frozen=True, slots=True)
class Numbers:
    a: int
    b: int
    c: int


@dataclass(frozen=True, slots=True)
class Problem:
    """One word problem. Two are the same when `key` is: template and numbers, whatever the name and the thing.

    Example:
        Problem(template=0, numbers=Numbers(14, 9, 5), person=0, thing=0).solution == "14+9=23\\n23-5=18\\n#### 18"
    """

    template: int
    numbers: Numbers
    person: int
    thing: int

    @property
    def key(self) -> str:
        return f"{self.template}:{self.numbers.a},{self.numbers.b},{self.numbers.c}"

    @property
    def question(self) -> str:
        person, thing, numbers = PEOPLE[self.person], THINGS[self.thing], self.numbers
        story = TEMPLATES[self.template].text.format(
            name=person.name, They=person.pronoun, thing=thing, a=numbers.a, b=numbers.b, c=numbers.c
        )
        return f"{story} {QUESTION.format(thing=thing)}"

    @property
    def signs(self) -> str:
        return TEMPLATES[self.template].signs

    @property
    def half(self) -> int:
        """The result of the first step."""
        return _apply(self.signs[0], self.numbers.a, self.numbers.b)

    @property
    def answer(self) -> int:
        return _apply(self.signs[1], self.half, self.numbers.c)

    @property
    def solution(self) -> str:
        return self._worked(self.signs[1])

    @property
    def slipped(self) -> str:
        """The worked solution of someone who adds in the last step, whatever the story says."""
        return self._worked("+")

    def _worked(self, last_sign: str) -> str:
        numbers, half = self.numbers, self.half
        answer = _apply(last_sign, half, numbers.c)
        return f"{numbers.a}{self.signs[0]}{numbers.b}={half}\n{half}{last_sign}{numbers.c}={answer}\n#### {answer}"


def _apply(sign: str, left: int, right: int) -> int:
    return left + right if sign == "+" else left - right
