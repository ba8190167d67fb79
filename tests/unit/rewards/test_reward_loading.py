from __future__ import annotations

import functools
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

import groupwise.rewards
from groupwise.config import RewardConfig
from groupwise.errors import ConfigError
from groupwise.rewards import LoadedReward, load_reward
from groupwise.rewards.signature import function_name, read_signature

GOOD = """
from reward_helper_of_this_test import BONUS

def polite(completions, **columns):
    return [BONUS for _ in completions]

def needs_answer(completions, answer, scale=2.0):
    return [scale for _ in completions]

class Judge:
    def __call__(self, completions):
        return [0.0 for _ in completions]
    def method(self, completions):
        return [5.0 for _ in completions]

judge = Judge()
NUMBER = 3
"""


@pytest.fixture
def rewards_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "reward_helper_of_this_test.py").write_text("BONUS = 1.0\n")
    path = tmp_path / "my rewards.py"
    path.write_text(GOOD, encoding="utf-8")
    return path


def load(name: str, **args: Any) -> LoadedReward:
    return load_reward(RewardConfig.model_validate({"name": name, "args": args}))


def test_function_of_a_file(rewards_file: Path) -> None:
    loaded = load(f"{rewards_file}:polite")
    assert loaded.name == "polite"
    assert loaded.function(["a", "b"]) == [1.0, 1.0]
    assert Path(loaded.signature.file) == rewards_file.resolve()


def test_relative_path_and_object_and_method(rewards_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(rewards_file.parent)
    assert load("my rewards.py:judge").function(["a"]) == [0.0]
    assert load("./my rewards.py:judge.method").function(["a"]) == [5.0]
    assert load("./my rewards.py:judge.method").name == "method"


def test_functions_of_one_file_share_it_and_an_edit_is_seen(rewards_file: Path) -> None:
    first, second = load(f"{rewards_file}:polite"), load(f"{rewards_file}:needs_answer")
    assert first.function.__globals__ is second.function.__globals__
    rewards_file.write_text("def polite(completions):\n    return [9.0]\n")
    assert load(f"{rewards_file}:polite").function(["a"]) == [9.0]
    assert first.function(["a"]) == [1.0]


def test_file_with_bom_and_unicode(tmp_path: Path) -> None:
    path = tmp_path / "récompense.py"
    path.write_bytes("\ufeffdef é(completions):\n    return [len('日本')] * len(completions)\n".encode())
    assert load(f"{path}:é").function(["a"]) == [2]


def test_function_of_a_module(rewards_file: Path) -> None:
    sys.path.append(str(rewards_file.parent))
    (rewards_file.parent / "importable_rewards_of_this_test.py").write_text("def one(completions):\n    return [1]\n")
    assert load("importable_rewards_of_this_test:one").function(["a"]) == [1]


@pytest.mark.parametrize(
    ("suffix", "message"),
    [
        (":polit", r"has no 'polit'; did you mean 'polite'\? functions there: needs_answer, polite"),
        (":NUMBER", "not a function but int"),
        (":NUMBER.x", "has no 'x'"),
        (":Judge", "is a class"),
        ("", "names a file and no function"),
        (":", "expected path/to/file.py:function"),
    ],
)
def test_wrong_function_of_a_file(rewards_file: Path, suffix: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(f"{rewards_file}{suffix}")


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("", "functions there: none"),
        ("def f(:\n", r"SyntaxError.*bad\.py:1"),
        ("\n\n1 / 0\n", r"ZeroDivisionError: division by zero \(at .*bad\.py:3\)"),
        ("import no_such_module_at_all\n", "ModuleNotFoundError.*no_such_module_at_all"),
        ("import sys\nsys.exit(3)\n", "SystemExit: 3"),
        ("x = '\x00'\n", "loading it raised"),
    ],
)
def test_files_that_do_not_load(tmp_path: Path, code: str, message: str) -> None:
    path = tmp_path / "bad.py"
    path.write_text(code)
    for _ in range(2):  # a failed load leaves nothing behind that a second one would find
        with pytest.raises(ConfigError, match=message):
            load(f"{path}:f")


def test_interrupt_while_loading_passes(tmp_path: Path) -> None:
    path = tmp_path / "interrupted.py"
    path.write_text("raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        load(f"{path}:f")


def test_places_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load(f"{tmp_path}/missing.py:f")
    with pytest.raises(ConfigError, match="is a folder"):
        load(f"{tmp_path}/:f")
    (tmp_path / "f.txt").write_text("")
    with pytest.raises(ConfigError, match=r"has to end with \.py"):
        load(f"{tmp_path}/f.txt:f")
    with pytest.raises(ConfigError, match="no module 'no_such_module_at_all'"):
        load("no_such_module_at_all:f")
    with pytest.raises(ConfigError, match=r"no module 'json\.nothing'"):
        load("json.nothing:f")
    with pytest.raises(ConfigError, match="module:function"):
        load(":f")


def test_args_are_bound_and_checked(rewards_file: Path) -> None:
    loaded = load(f"{rewards_file}:needs_answer", scale=3.0)
    assert loaded.args == {"scale": 3.0}
    assert loaded.signature.needed_columns == ("answer",)
    assert load(f"{rewards_file}:needs_answer", answer="x").signature.needed_columns == ()
    assert load(f"{rewards_file}:polite", anything=1).args == {"anything": 1}
    with pytest.raises(ConfigError, match=r"no argument 'scal'; did you mean 'scale'\? valid ones: answer, scale"):
        load(f"{rewards_file}:needs_answer", scal=3.0)
    with pytest.raises(ConfigError, match="may not set 'completions'"):
        load(f"{rewards_file}:polite", completions=[])


def test_signatures() -> None:
    async def later(completions: Any, answer: Any) -> list[float]:
        return []

    class Judge:
        async def __call__(self, completions: Any) -> list[float]:
            return []

    def by_position(completions: Any, /) -> list[float]:
        return []

    def plain(prompts: Any, completions: Any, completion_ids: Any, level: Any, *, depth: int = 1) -> list[float]:
        return []

    partial = functools.partial(later, answer=1)
    for function in (later, Judge(), partial):
        assert read_signature(function, name="r", args={}).is_async
    signature = read_signature(plain, name="r", args={})
    assert (signature.needed_columns, signature.takes_all, signature.is_async) == (("level",), False, False)
    assert [function_name(f) for f in (plain, Judge(), partial, lambda: 0)] == ["plain", "Judge", "later", "lambda"]
    with pytest.raises(ConfigError, match="only be given by position"):
        read_signature(by_position, name="r", args={})


def test_the_example_in_the_documentation_works(tmp_path: Path) -> None:
    documentation = groupwise.rewards.__doc__ or ""
    example = documentation.split("Example, `my_rewards.py`:")[1].split("Use it with")[0]
    check = documentation.split("before any model is loaded:")[1].split("What the scorer")[0]
    path = tmp_path / "my_rewards.py"
    path.write_text(textwrap.dedent(example) + textwrap.dedent(check))
    load(f"{path}:close_to", scale=20.0).function.__globals__["test_close_to"]()
    assert load(f"{path}:says_please").function(["Please!", "now"]) == [1.0, 0.0]
