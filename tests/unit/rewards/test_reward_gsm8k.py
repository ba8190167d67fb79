from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from groupwise.errors import ConfigError, DataError
from groupwise.rewards.final_number import read_number
from groupwise.rewards.gsm8k import ground_truth, gsm8k_reward, gsm8k_row_check

GSM8K = Path(__file__).parents[3] / "../shared/data/gsm8k"


def score(text: str, truth: Any = "72", **settings: Any) -> float | None:
    return gsm8k_reward(**settings)([text], answer=[truth])[0]


@pytest.mark.parametrize(
    ("text", "truth", "expected"),
    [
        ("#### 72 dollars", "72", 1.0),
        ("#### 72%", "72", 1.0),
        ("#### 1,000", "1000", 1.0),
        ("#### -5", "-5", 1.0),
        ("#### 7\nno: #### 72", "72", 1.0),
        ("#### 72\nno: #### 7", "72", 0.0),
        ("#### 72.", "72", 0.0),
        ("#### 72.0", "72", 0.0),
        ("####72", "72", 0.0),
        ("#### $72", "72", 0.0),
        ("#### **72**", "72", 0.0),
        ("####  72", "72", 0.0),
        ("72", "72", 0.0),
        ("", "72", 0.0),
        ("#### 72" + " " * 293, "72", 1.0),
        ("#### 72" + " " * 294, "72", 0.0),
    ],
)
def test_strict_is_the_rule_of_xtuner(text: str, truth: str, expected: float) -> None:
    reward = gsm8k_reward(mode="strict")
    assert reward([text], reward_model=[{"ground_truth": truth, "style": "rule"}]) == [expected]


@pytest.mark.parametrize(
    "text",
    [
        "#### 72",
        "####72",
        "#### 72.0",
        "#### 72.",
        "#### $72",
        "#### \\$72",
        "#### **72**",
        "#### __72__",
        "#### \\boxed{72}",
        "#### $\\boxed{72}$",
        "#### 72 dollars",
        "#### 72%",
        "#### 72, so she is done. Next, 5 more.",
        "#### 6 * 12 = 72",
        "#### x = 72 eggs",
        "####\n72",
        "#### The answer is 72",
        "#### 7.2e1",
        "#### 72-hour",
        "##### 72",
        "#### ７２",
        "#### 1 #### 72",
        "\ufeff#### 72\u00a0€",
        "#### 72\n\n#",
        "#### 72" + " " * 5000,
    ],
)
def test_flexible_accepts_what_means_the_number(text: str) -> None:
    assert score(text) == 1.0


@pytest.mark.parametrize(
    "text",
    [
        "72",
        "#### ",
        "#### no idea",
        "#### 7",
        "#### 720",
        "#### 7 2",
        "#### 72 73",
        "#### 72, 73",
        "#### 72/5",
        "#### 72 / 5",
        "#### 72-80",
        "#### 72 * 2",
        "#### 72 \\times 2",
        "#### 72:30",
        "#### 72.5",
        "#### 72.5.1",
        "#### \\frac{72}{5}",
        "#### -72",
        "#### −72",
        "#### 72½",
        "#### 72 #### 5",
        "#### " + "7" * 4000,
    ],
)
def test_flexible_refuses_what_does_not(text: str) -> None:
    assert score(text) == 0.0


@pytest.mark.parametrize(
    ("text", "truth"),
    [
        ("#### -5", "-5"),
        ("#### −5", -5),
        ("#### -$5", "-5"),
        ("#### $-5", "-5"),
        ("#### 1,234,567", 1234567),
        ("#### 1{,}000", "1,000"),
        ("#### 0.5", 0.5),
        ("#### .50", "0.5"),
        ("#### 10", "She has 4 + 6 = <<4+6=10>>10.\n#### 10"),
        ("#### 1000", "so\n#### 1,000"),
    ],
)
def test_flexible_compares_numbers(text: str, truth: Any) -> None:
    assert score(text, truth) == 1.0


def test_scores() -> None:
    for mode in ("strict", "flexible"):
        reward = gsm8k_reward(mode=mode, score=2, format_score=0.1)
        assert reward(["#### 72", "#### 71", "72"], answer=["72"] * 3) == [2.0, 0.1, 0.0]


def test_conversations_and_text_score_alike() -> None:
    reward = gsm8k_reward()
    conversation = [[{"role": "assistant", "content": "#### 72"}], [{"role": "assistant", "content": None}], []]
    assert reward(conversation, answer=["72"] * 3) == [1.0, 0.0, 0.0]


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=60), st.text(max_size=60))
def test_no_text_raises(before: str, after: str) -> None:
    for mode in ("strict", "flexible"):
        assert score(before + "####" + after, mode=mode) in (0.0, 1.0)
        assert score(before, mode=mode) in (0.0, 1.0)


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="0123456789.,-−$#*{}\\boxedeE+/= \n٣²", max_size=30))
def test_no_near_number_raises(text: str) -> None:
    number = read_number(text)
    assert number is None or isinstance(number, Decimal)
    assert score("####" + text) in (0.0, 1.0)


@settings(deadline=None)
@given(st.integers(-(10**12), 10**12))
def test_every_integer_is_read_back(number: int) -> None:
    for text in (f"#### {number}", f"####{number:,}", f"#### **{number}.00**"):
        assert score(text, number) == 1.0
        assert score(text, number + 1) == 0.0


def test_truth_comes_from_the_first_column_that_has_one() -> None:
    assert ground_truth({"reward_model": {"ground_truth": "1"}, "answer": "2"}) == "1"
    assert ground_truth({"reward_model": {"style": "rule"}, "answer": "2"}) == "2"
    assert ground_truth({"reward_model": None, "solution": 3}) == "3"
    assert ground_truth({"answer": float("nan"), "ground_truth": "4"}) == "4"


def test_missing_truth_names_what_the_row_has() -> None:
    with pytest.raises(ConfigError, match=r"data\.answer_column.*") as caught:
        gsm8k_reward()(["#### 1"], prompts=["?"], question=["2+2?"])
    assert "the row has: question." in str(caught.value)


@pytest.mark.parametrize("truth", [None, "", True, float("inf"), "#### ", ["5", "6"], {"a": 5}])
def test_empty_truth_is_a_data_error(truth: Any) -> None:
    with pytest.raises(DataError, match="no reference answer"):
        score("#### 1", truth)


@pytest.mark.parametrize("truth", ["blue", "3/4", "1 2"])
def test_flexible_needs_a_number_as_truth(truth: Any) -> None:
    with pytest.raises(DataError, match="not one number"):
        score("no marker here", truth)
    with pytest.raises(DataError, match="not one number"):
        gsm8k_row_check()({"answer": truth})
    gsm8k_row_check(mode="strict")({"answer": truth})


@pytest.mark.parametrize("bad", [{"mode": "Strict"}, {"score": "1"}, {"score": float("nan")}, {"format_score": True}])
def test_bad_settings(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="reward 'gsm8k'"):
        gsm8k_reward(**bad)


@pytest.mark.skipif(not (GSM8K / "test.jsonl").exists(), reason="GSM8K is not here")
def test_every_gsm8k_answer_is_right_and_a_wrong_one_is_not() -> None:
    for name in ("train.jsonl", "test.jsonl"):
        with (GSM8K / name).open(encoding="utf-8") as lines:
            answers = [json.loads(line)["answer"] for line in lines]
        assert set(gsm8k_reward()(answers, answer=answers)) == {1.0}
        assert set(gsm8k_reward(mode="strict")(answers, answer=answers)) == {1.0}
        wrong = [f"{answer}1" for answer in answers]
        # "0" followed by "1" still reads 01 = 1, never 0.
        assert set(gsm8k_reward()(wrong, answer=answers)) == {0.0}
