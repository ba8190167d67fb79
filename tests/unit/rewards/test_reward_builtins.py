from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from typing import Any

import pytest

from groupwise.config import RewardConfig
from groupwise.errors import ConfigError, DataError
from groupwise.inputs import ModelInput, SampleKey
from groupwise.rewards import RewardScorer, completion_texts, load_reward, reward_names
from groupwise.rewards import format as format_module
from groupwise.rewards.format import format_reward, think_format_reward
from groupwise.rewards.length import overlong_reward
from groupwise.rewards.match import exact_match_reward
from groupwise.types import Completion, Prompt, Rollout


def config(name: str, **args: Any) -> RewardConfig:
    return RewardConfig.model_validate({"name": name, "args": args})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2 + 2 = 4\n#### 4", 1.0),
        ("so #### -1,000.50\n", 1.0),
        ("#### 4", 1.0),
        ("#### 4 dollars", 0.0),
        ("####4", 0.0),
        ("#### 4.", 0.0),
        ("#### 4\nDone.", 0.0),
        ("", 0.0),
        ("日本語 #### 4", 1.0),
    ],
)
def test_default_format_is_a_final_number(text: str, expected: float) -> None:
    assert format_reward()([text]) == [expected]


def test_format_matches_the_whole_text_and_gives_its_scores() -> None:
    reward = format_reward(pattern=r"<a>\d+</a>", score=0.5, miss_score=-1)
    assert reward(["<a>1</a>", "<a>1</a>!", " <a>1</a>", ""]) == [0.5, -1.0, -1.0, -1.0]


@pytest.mark.parametrize("pattern", ["(", "[", "*", "(?P<a>x)(?P<a", ""])
def test_bad_patterns_are_refused(pattern: str) -> None:
    with pytest.raises(ConfigError, match="reward 'format'"):
        format_reward(pattern=pattern)


def test_catastrophic_pattern_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(format_module, "_SECONDS_PER_COMPLETION", 0.2)
    started = time.perf_counter()
    with pytest.raises(TimeoutError, match="nested repetitions"):
        format_reward(pattern="(x|x)+y")(["x" * 60])
    assert time.perf_counter() - started < 3


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>hm</think> 4", 1.0),
        ("\n<think>\nhm\n</think>\n4", 1.0),
        ("<think></think>4", 1.0),
        ("<think>hm</think>", 0.0),
        ("<think>hm", 0.0),
        ("hm</think>4", 0.0),
        ("</think><think>4", 0.0),
        ("so <think>hm</think> 4", 0.0),
        ("<think><think>hm</think> 4", 0.0),
        ("", 0.0),
    ],
)
def test_think_format(text: str, expected: float) -> None:
    assert think_format_reward()([text]) == [expected]


@pytest.mark.parametrize(
    ("prompt", "text", "expected"),
    [
        ("<user>2+2?<assistant><think>", "2 and 2 make 4.\n</think>\nThe answer is 4.", 1.0),
        ("<user>2+2?<assistant><think>\n", "</think>4", 1.0),
        ("<user>2+2?<assistant><think>\n", "<think>hm</think>4", 0.0),
        ("<user>2+2?<assistant><think>\n", "hm</think>", 0.0),
        ("<user>2+2?<assistant><think>\n", "hm", 0.0),
        ("<user>what is <think>?<assistant>", "<think>hm</think>4", 1.0),
        ("<user>what is <think>?<assistant>", "hm</think>4", 0.0),
    ],
)
def test_think_format_knows_what_the_prompt_opened(prompt: str, text: str, expected: float) -> None:
    row = Prompt("r", (), prompt, ModelInput.of((1,)))
    scorer = RewardScorer([config("think_format")])
    done = [Rollout.one_turn(Completion(SampleKey("r", 0, 0), (1,), (0.0,), (0,), text, "stop"))]
    assert asyncio.run(scorer.score(row, done))[0].reward == expected


UNEARNABLE = [
    ("think_format", {}, "<assistant><think>\n\n</think>\n\n", {}, (), "thoughts are over before the answer begins"),
    ("think_format", {}, "<assistant>", {}, ("think>",), "stop string 'think>'"),
    ("think_format", {}, "<assistant>", {}, ("<think>",), "stop string '<think>'"),
    ("think_format", {}, "<assistant><think>", {}, ("</think>",), "stop string '</think>'"),
    ("format", {"pattern": "^(?s)<think>.*"}, "<assistant><think>\n", {}, (), "take '<think>' out of the pattern"),
    ("format", {}, "?", {}, ("####",), "needs text after '#### '"),
    ("gsm8k", {}, "?", {"answer": "4"}, ("\n\n", "##"), "stop string '##'"),
    ("gsm8k", {"mode": "strict"}, "?", {"answer": "4"}, ("#### ",), "needs text after '#### '"),
    ("exact_match", {}, "?", {"answer": "  "}, (), "row 'r': .*is blank"),
    ("exact_match", {}, "?", {"answer": "a\nb"}, ("\n",), "row 'r': .*ends it before"),
]


@pytest.mark.parametrize(("name", "args", "text", "columns", "stop", "message"), UNEARNABLE)
def test_a_reward_that_no_answer_can_earn_is_refused(
    name: str, args: dict[str, Any], text: str, columns: dict[str, Any], stop: tuple[str, ...], message: str
) -> None:
    scorer = RewardScorer([config(name, **args)])
    with pytest.raises((ConfigError, DataError), match=message):
        scorer.check_prompts([Prompt("r", (), text, ModelInput.of((1,)), columns=columns)], stop=stop)


@pytest.mark.parametrize(
    ("name", "args", "text", "columns", "stop"),
    [
        ("think_format", {}, "<assistant>", {}, ("\n\n",)),
        ("think_format", {}, "<assistant><think>", {}, ("<think>",)),
        ("format", {"pattern": ".*</think>.*"}, "<assistant><think>", {}, ("####",)),
        ("gsm8k", {}, "?", {"answer": "4"}, ("#### ", "\n", "#####")),
        ("exact_match", {}, "?", {"answer": "a."}, (".",)),
        ("exact_match", {}, "?", {"answer": None}, (".",)),
    ],
)
def test_a_reward_that_can_be_earned_is_not_refused(
    name: str, args: dict[str, Any], text: str, columns: dict[str, Any], stop: tuple[str, ...]
) -> None:
    RewardScorer([config(name, **args)]).check_prompts(
        [Prompt("r", (), text, ModelInput.of((1,)), columns=columns)], stop=stop
    )


def test_a_tokenizer_that_hides_the_mark_is_refused() -> None:
    class Hides:
        def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
            return [1]

        def decode(self, token_ids: Any, *, skip_special_tokens: bool = False) -> str:
            return "" if skip_special_tokens else "</think>"

    tokenizer: Any = Hides()
    with pytest.raises(ConfigError, match="'think_format' cannot be earned: it looks for '</think>'"):
        RewardScorer([config("think_format")]).check_prompts([], tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("format", {"score": 0}),
        ("think_format", {"score": 1, "miss_score": 1}),
        ("gsm8k", {"score": 0}),
        ("exact_match", {"score": 0}),
    ],
)
def test_scores_that_are_all_the_same_are_refused(name: str, args: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="every answer gets the same"):
        load_reward(config(name, **args))


def test_exact_match() -> None:
    assert exact_match_reward()([" Paris\n", "paris", "", "é"], answer=["Paris", "Paris", None, "é"]) == [1, 0, None, 1]
    folded = exact_match_reward(column="city", ignore_case=True, score=2)
    assert folded(["PARIS", "7"], city=["paris", 7]) == [2.0, 2.0]
    with pytest.raises(ConfigError, match="needs the column 'answer'"):
        exact_match_reward()(["x"], question=["?"])


def test_overlong_is_equation_13_of_dapo() -> None:
    reward = overlong_reward(max_tokens=20, buffer_tokens=8)
    lengths = [0, 12, 13, 16, 20, 21, 500]
    expected = [0.0, 0.0, -1 / 8, -0.5, -1.0, -1.0, -1.0]
    assert reward(completion_ids=[[1] * n for n in lengths]) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("gsm8K", {}, "did you mean 'gsm8k'"),
        ("no_such_thing", {}, "expected one of gsm8k, format"),
        ("", {}, "unknown reward"),
        ("gsm8k", {"mod": "strict"}, "did you mean 'mode'"),
        ("overlong", {"max_tokens": 5}, "needs the argument 'buffer_tokens'"),
        ("overlong", {"max_tokens": 5, "buffer_tokens": 6}, "more than max_tokens"),
        ("overlong", {"max_tokens": 5, "buffer_tokens": 2.5}, "whole number"),
        ("exact_match", {"ignore_case": "yes"}, "neither true nor false"),
        ("exact_match", {"column": 3}, "is not text"),
        ("think_format", {"score": None}, "not a finite number"),
    ],
)
def test_settings_of_built_ins_are_checked(name: str, args: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_reward(config(name, **args))


def test_every_built_in_loads_and_scores_any_text() -> None:
    for name in reward_names():
        args = {"max_tokens": 4, "buffer_tokens": 2} if name == "overlong" else {}
        reward = load_reward(config(name, **args))
        given = {"completions": ["", "é\ud800\x00"], "completion_ids": [[], [1]], "answer": ["1", "1"]}
        if not reward.signature.takes_all:
            given = {key: value for key, value in given.items() if key in reward.signature.accepted}
        assert reward.function(**given) == [0.0, 0.0], name


def test_completion_texts_takes_both_shapes() -> None:
    two_turns = [{"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert completion_texts(["x", two_turns, [{"role": "assistant"}], []]) == ["x", "b", "", ""]


def test_rewards_do_not_load_torch() -> None:
    code = "import sys, groupwise.rewards; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
