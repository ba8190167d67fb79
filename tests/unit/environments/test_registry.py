"""Environments by name: built in, or a user's, checked before a run begins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from groupwise.config.environment import EnvironmentConfig
from groupwise.environments import SINGLE_TURN, Environments, load_environments
from groupwise.environments.calculator import Calculator
from groupwise.errors import ConfigError

FILE = """
class Good:
    stop = "!"
    def __init__(self, size=1):
        self.size = size
    def begin(self, prompt, key): ...
    def answer(self, turn): ...
    def close(self): ...

class NoAnswer:
    def begin(self, prompt, key): ...
    def close(self): ...

class BadStop(Good):
    stop = ("",)

def fails():
    raise RuntimeError("no simulator")

number = 3
"""


def load(**settings: Any) -> Environments:
    tokenizer: Any = object()
    return load_environments(EnvironmentConfig.model_validate(settings), tokenizer, template_kwargs={})


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(FILE)
    return path


def test_without_a_name_an_episode_is_one_turn() -> None:
    assert load() is SINGLE_TURN
    assert SINGLE_TURN.weights == {}


def test_the_calculator_is_built_in() -> None:
    found = load(name="calculator", max_turns=3, weight=0.5)
    assert found.make is not None
    assert isinstance(found.make(), Calculator)
    assert (found.stop, found.max_turns, found.weights) == ((">>",), 3, {"environment": 0.5})


def test_a_users_own_gets_its_arguments(file: Path) -> None:
    found = load(name=f"{file}:Good", args={"size": 7})
    assert found.make is not None
    one: Any = found.make()
    assert (one.size, found.stop) == (7, ("!",))
    assert found.make() is not one


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("calculater", "did you mean 'calculator'"),
        ("mine.py:Good", "does not exist"),
        ("{file}:Goood", "did you mean 'Good'"),
        ("{file}:NoAnswer", "without answer"),
        ("{file}:BadStop", "none of them empty"),
        ("{file}:fails", "RuntimeError: no simulator"),
        ("{file}:number", "is no class and no function"),
    ],
)
def test_what_cannot_be_is_refused(file: Path, name: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load(name=name.format(file=file))


def test_arguments_that_it_does_not_take_are_refused(file: Path) -> None:
    with pytest.raises(ConfigError, match=r"making one raised TypeError.*environment\.args"):
        load(name=f"{file}:Good", args={"sise": 7})
