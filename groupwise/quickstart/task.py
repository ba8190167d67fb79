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

SLIP_SHARE = 0.75
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


@dataclass(frozen=True, slots=True)
class TaskFiles:
    """What `make_task` wrote.

    Attributes:
        sft: warm-up rows with worked solutions, a share of them wrong.
        train: rows for reinforcement learning; its solutions are right.
        test: held-out rows; no problem of theirs is in the other two.
    """

    sft: Path
    train: Path
    test: Path

    @classmethod
    def under(cls, folder: str | Path) -> TaskFiles:
        """The files' paths in this folder, written or not."""
        folder = Path(folder)
        return cls(sft=folder / SFT_FILE, train=folder / TRAIN_FILE, test=folder / EVAL_FILE)


def make_task(out_dir: str | Path, *, seed: int = 0, num_sft: int, num_train: int, num_eval: int = 256) -> TaskFiles:
    """Write `sft.jsonl`, `train.jsonl` and `test.jsonl`; the same arguments give the same bytes.

    Every problem (template and numbers) is in at most one place, so held-out accuracy measures what was learnt, not
    what was seen. Rows have GSM8K's columns: `data_source`, `prompt`, `ability`, `reward_model`, `extra_info`.

    Raises:
        ConfigError: a count is below 1, or the counts together exceed the different problems that there are.
    """
    counts = {"num_sft": num_sft, "num_train": num_train, "num_eval": num_eval}
    for name, count in counts.items():
        if count < 1:
            raise ConfigError(f"{name} = {count}; expected at least 1")
    rng = random.Random(seed)
    problems = _all_problems(rng)
    wanted = sum(counts.values())
    if wanted > len(problems):
        asked = " + ".join(f"{name} = {count}" for name, count in counts.items())
        raise ConfigError(f"{asked} are {wanted} problems, but only {len(problems)} differ; lower the counts")
    held_out, rest = problems[:num_eval], problems[num_eval:wanted]
    _assert_disjoint(held_out, rest)
    Path(out_dir).mkdir(parents=True, exist_ok=True)
    files = TaskFiles.under(out_dir)
    demonstrations = [problem.slipped if rng.random() < SLIP_SHARE else problem.solution for problem in rest[:num_sft]]
    _write(files.sft, "sft", problems=rest[:num_sft], solutions=demonstrations)
    _write(files.train, "train", problems=rest[num_sft:], solutions=[problem.solution for problem in rest[num_sft:]])
    _write(files.test, "test", problems=held_out, solutions=[problem.solution for problem in held_out])
    return files


def _all_problems(rng: random.Random) -> list[Problem]:
    """Every template with all numbers that keep the results from falling below zero, in random order and dress."""
    problems = [
        Problem(template, Numbers(a, b, c), person=rng.randrange(len(PEOPLE)), thing=rng.randrange(len(THINGS)))
        for template, a, b, c in product(range(len(TEMPLATES)), FIRST_NUMBERS, OTHER_NUMBERS, OTHER_NUMBERS)
    ]
    possible = [problem for problem in problems if problem.half >= 0 and problem.answer >= 0]
    rng.shuffle(possible)
    return possible


def _assert_disjoint(held_out: Sequence[Problem], rest: Sequence[Problem]) -> None:
    shared = {problem.key for problem in held_out} & {problem.key for problem in rest}
    assert not shared, f"{len(shared)} held-out problems are in the training rows, such as {min(shared)}"


def _write(path: Path, split: str, *, problems: Sequence[Problem], solutions: Sequence[str]) -> None:
    rows = [
        _row(problem, split, index=index, worked=worked)
        for index, (problem, worked) in enumerate(zip(problems, solutions, strict=True))
    ]
    write_text_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _row(problem: Problem, split: str, *, index: int, worked: str) -> dict[str, Any]:
    return {
        "data_source": DATA_SOURCE,
        "prompt": [{"content": problem.question, "role": "user"}],
        "ability": "math",
        "reward_model": {"ground_truth": str(problem.answer), "style": "rule"},
        "extra_info": {"answer": worked, "index": index, "question": problem.question, "split": split},
    }
