"""`groupwise reward check`: the numbers of answers whose numbers are known, and what is found in them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from groupwise.cli import main
from groupwise.config import DataConfig
from groupwise.data.rows import row_uid
from groupwise.reward_check import answers_of_run
from groupwise.trajectories import SegmentRow, to_json
from tests.made_run import lines, rollout

REWARDS = """
def letters(completions, **columns):
    return [float(len(text)) for text in completions]

def right(completions, answer, **columns):
    return [float(text == wanted) for text, wanted in zip(completions, answer)]

def always(completions, **columns):
    return [0.5] * len(completions)

def broken(completions, **columns):
    raise ValueError("no such service")

def ids(completion_ids, **columns):
    return [float(len(ids)) for ids in completion_ids]
"""
HOSTILE = "</script><script>alert(1)</script>\u202e\ud800\x1b[2J"


@pytest.fixture
def check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, Any]]:
    (tmp_path / "rewards.py").write_text(REWARDS)
    rows = [{"prompt": f"question {i}", "answer": "abc"[: i % 3 + 1]} for i in range(6)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(*names: str, completions: list[dict[str, Any]] | None = None, flags: tuple[str, ...] = ()) -> Any:
        arguments = ["reward", "check", "--data", str(tmp_path / "data.jsonl"), *flags]
        for name in names:
            arguments += ["--reward", f"{tmp_path / 'rewards.py'}:{name}"]
        if completions is not None:
            file = tmp_path / "completions.jsonl"
            file.write_text("".join(json.dumps(row) + "\n" for row in completions))
            arguments += ["--completions", str(file)]
        code = main([*arguments, "--json"])
        out, err = capsys.readouterr()
        return code, json.loads(out) if out else err

    return run


def rules(found: dict[str, Any]) -> set[tuple[str, str]]:
    return {(finding["rule"], finding["reward"]) for finding in found["findings"]}


def test_numbers_of_answers_that_are_known(check: Callable[..., Any]) -> None:
    texts = [["a", "ab"], ["abc", "abc"], ["", "abcd"]]
    completions = [{"row": row, "completions": some} for row, some in enumerate(texts)]
    code, found = check("letters", "right", completions=completions)
    assert code == 0
    letters, right = found["rewards"]
    assert (letters["count"], letters["mean"], letters["low"], letters["high"]) == (6, 13 / 6, 0.0, 4.0)
    assert letters["std"] == pytest.approx(1.4719601443879744)
    assert letters["histogram"] == [1, 0, 1, 0, 0, 1, 0, 2, 0, 1]
    assert letters["equal_groups"] == pytest.approx(1 / 3)
    assert letters["correlation_with_length"] == pytest.approx(1.0)
    assert (right["mean"], right["at_high"]) == (pytest.approx(1 / 6), pytest.approx(1 / 6))  # "a" alone
    # Half of "ab" is right for the first row, of the six rows without answers there is no half.
    assert right["probes"] == {"empty": 0.0, "echo": 0.0, "half": pytest.approx(1 / 3)}
    assert found["best"][0]["answer"] == "abcd"
    assert found["worst"][0]["answer"] == ""
    assert found["correlations"][0]["first"] == "letters"


def test_what_is_wrong_is_found_and_what_is_not_is_not(check: Callable[..., Any]) -> None:
    completions = [{"row": row, "completions": ["a" * (row + k + 1) for k in range(4)]} for row in range(6)]
    code, found = check("letters", "always", "broken", completions=completions)
    assert code == 1, "a reward that fails is an error"
    assert rules(found) >= {("length", "letters"), ("constant", "always"), ("failed", "broken")}
    assert ("pays_empty", "always") not in rules(found) or found["rewards"][1]["probes"]["empty"] == 0.5
    assert not {rule for rule, reward in rules(found) if reward == "letters"} & {"constant", "failed", "equal_groups"}
    assert found["rewards"][2]["failed"] == 24
    assert "no such service" in found["rewards"][2]["causes"][0]["cause"]
    assert check("letters", "always", completions=completions)[0] == 0
    assert check("always", completions=completions, flags=("--fail-on", "constant"))[0] == 1
    assert check("broken", completions=completions, flags=("--fail-on", "none"))[0] == 0


def test_the_datas_own_answers_are_expected_to_earn(check: Callable[..., Any]) -> None:
    code, found = check("right", "letters")
    assert code == 0
    assert found["rewards"][0]["mean"] == 1.0
    assert rules(found) == {("rejects", "letters"), ("pays_echo", "letters")}
    assert ("pays_empty", "always") in rules(check("always")[1])


def test_what_cannot_be_checked_is_refused(check: Callable[..., Any]) -> None:
    code, said = check("ids")
    assert code == 2
    assert "reads completion_ids, and these answers have none" in said
    rows = [{"row": 0, "completion": "a", "token_ids": [5, 6]}]
    assert check("ids", completions=rows)[1]["rewards"][0]["mean"] == 2.0
    assert "row 9, but" in check("letters", completions=[{"row": 9, "completion": "a"}])[1]
    assert "is no row of" in check("letters", completions=[{"uid": "x", "completion": "a"}])[1]
    assert 'expected "completion"' in check("letters", completions=[{"row": 1, "other": "a"}])[1]
    assert "no finding is called so" in check("letters", flags=("--fail-on", "boring"))[1]


def test_hostile_answers_are_text_on_the_page(check: Callable[..., Any], tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    rows = [{"row": 0, "completions": [HOSTILE, "a" * 100_000]}]
    code, found = check("letters", completions=rows, flags=("--html", str(page)))
    assert code == 0
    text = page.read_text("utf-8")
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)" in text
    assert "default-src 'none'" in text
    assert "a" * 100_000 in text
    assert "\\ud800" in found["worst"][0]["answer"]


def test_a_runs_own_answers(tmp_path: Path, check: Callable[..., Any]) -> None:
    assert "config.json" in check("letters", flags=("--run", str(tmp_path / "nothing")))[1]


def test_what_a_run_passes_over_is_found(check: Callable[..., Any]) -> None:
    completions = [{"row": 0, "completions": ["a", "b"]}]
    for on_error in ("zero", "stop"):
        code, found = check("broken", completions=completions, flags=("--reward.0.on_error", on_error))
        assert code == 1
        assert ("failed", "broken") in rules(found)
        assert found["rewards"][0]["failed"] == 2


def test_equal_answers_are_one_example(check: Callable[..., Any]) -> None:
    _, found = check("letters", completions=[{"row": 0, "completions": ["abc", "abc", "a", "abc"]}])
    assert [one["answer"] for one in found["best"]] == ["abc", "a"]


def test_turns_of_a_run_are_judged_as_turns(tmp_path: Path) -> None:
    rows = [{"prompt": "question 0"}, {"prompt": "question 1"}]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig()  # type: ignore[call-arg]
    [prompt, _] = [row_uid(i, row["prompt"]) for i, row in enumerate(rows)]
    turn = SegmentRow("model", "think", 3, finish_reason="stop")
    answer = SegmentRow("environment", "18", 2, messages=({"role": "tool", "content": "18"},))
    last = SegmentRow("model", "so 18", 7, finish_reason="length", reward=0.5)
    whole = rollout(1, 0, 2, uid=prompt, segments=(turn, answer, last), finish_reason="length")
    none = rollout(1, 0, 3, uid=prompt, segments=(), token_ids=(), logprobs=(), policy_versions=(), status="failed")
    lines(tmp_path / "run/trajectories/step_000001.jsonl", [to_json(whole), to_json(none)])
    found = answers_of_run(tmp_path / "run", tmp_path / "data.jsonl", config)
    [(asked, [given])] = found.groups
    assert asked.text == "question 0"
    assert (given.length, given.cut) == (10, True)
    assert given.text == "think18so 18"
    assert given.rollout.loss_mask == (1,) * 3 + (0,) * 2 + (1,) * 7
    assert given.rollout.token_ids == whole.token_ids
    assert [segment.messages for segment in given.rollout.segments] == [(), answer.messages, ()]
    assert given.rollout.segments[2].reward == 0.5
