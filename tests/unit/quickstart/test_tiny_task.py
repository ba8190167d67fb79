"""The tiny task: right answers, disjoint splits, the promised share of slips, the same bytes for the same seed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from groupwise.errors import ConfigError
from groupwise.quickstart.task import DATA_SOURCE, SLIP_SHARE, TEMPLATES, Numbers, Problem, TaskFiles, make_task


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> TaskFiles:
    return make_task(tmp_path_factory.mktemp("task"), seed=0, num_sft=2000, num_train=500, num_eval=128)


def final_number(worked: str) -> str:
    return worked.rsplit("#### ", 1)[1]


def content_key(row: dict[str, Any]) -> str:
    """Template and numbers of a question, found without the code under test: names and things are wiped out."""
    question = re.sub(r"\b(Tom|Ben|Sam|Leo|Anna|Mia|Zoe|Eva)\b", "NAME", row["extra_info"]["question"])
    question = re.sub(r"\b(He|She)\b", "THEY", question)
    return re.sub(r"\b(apples|books|coins|pens|cards|shells|cakes|stamps)\b", "THING", question)


def test_a_problem_reads_as_its_docstring_says() -> None:
    problem = Problem(template=0, numbers=Numbers(14, 9, 5), person=0, thing=0)
    assert problem.question == ("Tom has 14 apples. He buys 9 more and gives 5 away. How many apples are there now?")
    assert problem.solution == "14+9=23\n23-5=18\n#### 18"
    assert problem.slipped == "14+9=23\n23+5=28\n#### 28"


def test_counts_and_columns(task: TaskFiles) -> None:
    for path, split, count in ((task.sft, "sft", 2000), (task.train, "train", 500), (task.test, "test", 128)):
        rows = read(path)
        assert len(rows) == count
        for index, row in enumerate(rows):
            assert list(row) == ["data_source", "prompt", "ability", "reward_model", "extra_info"]
            assert row["data_source"] == DATA_SOURCE
            assert row["prompt"] == [{"content": row["extra_info"]["question"], "role": "user"}]
            assert (row["extra_info"]["index"], row["extra_info"]["split"]) == (index, split)
            assert row["reward_model"]["style"] == "rule"


def test_every_arithmetic_line_is_right_even_in_slipped_demonstrations(task: TaskFiles) -> None:
    for row in read(task.sft) + read(task.train):
        first, second, last = row["extra_info"]["answer"].split("\n")
        results: list[int] = []
        for line in (first, second):
            match = re.fullmatch(r"(\d+)([+-])(\d+)=(\d+)", line)
            assert match, line
            left, sign, right, result = match.groups()
            assert int(result) == (int(left) + int(right) if sign == "+" else int(left) - int(right))
            results.append(int(result))
        assert second.startswith(str(results[0]))
        assert last == f"#### {results[1]}"


def test_truth_follows_the_story(task: TaskFiles) -> None:
    """Each template's signs are checked against the words of its story, not against the code's own table."""
    takes = ("gives", "lose", "loses", "took", "takes", "sold", "out")
    for template in TEMPLATES:
        parts = re.split(r"\{a\}|\{b\}|\{c\}", template.text)
        around_last = template.text[template.text.index("{b}") + 3 :]
        assert ("-" in template.signs) == any(word in template.text for word in takes)
        assert len(parts) == 4, template.text
        if template.signs[1] == "-":
            assert any(word in around_last for word in takes), template.text
    for row in read(task.train) + read(task.test):
        assert final_number(row["extra_info"]["answer"]) == row["reward_model"]["ground_truth"]
        assert 0 <= int(row["reward_model"]["ground_truth"]) < 100


def test_the_share_of_slips(task: TaskFiles) -> None:
    rows = read(task.sft)
    wrong = [row for row in rows if final_number(row["extra_info"]["answer"]) != row["reward_model"]["ground_truth"]]
    # 6,644 of the 11,060 problems end by taking away.
    assert len(wrong) / len(rows) == pytest.approx(SLIP_SHARE * 6644 / 11060, abs=0.04)


def test_no_problem_is_in_two_files_whatever_its_name_and_thing(task: TaskFiles) -> None:
    keys = [{content_key(row) for row in read(path)} for path in (task.sft, task.train, task.test)]
    assert [len(found) for found in keys] == [2000, 500, 128]
    assert not keys[0] & keys[1]
    assert not keys[0] & keys[2]
    assert not keys[1] & keys[2]


def test_the_seed_decides_every_byte(tmp_path: Path) -> None:
    texts = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        files = make_task(tmp_path / name, seed=seed, num_sft=20, num_train=20, num_eval=20)
        texts.append([path.read_bytes() for path in (files.sft, files.train, files.test)])
    assert texts[0] == texts[1]
    assert all(one != other for one, other in zip(texts[0], texts[2], strict=True))


def test_all_problems_can_be_used_and_not_one_more(tmp_path: Path) -> None:
    make_task(tmp_path, seed=0, num_sft=11_060 - 2, num_train=1, num_eval=1)
    with pytest.raises(ConfigError, match=r"11061 problems, but only 11060 differ; lower the counts"):
        make_task(tmp_path, seed=0, num_sft=11_060 - 1, num_train=1, num_eval=1)


@pytest.mark.parametrize(("sft", "train", "test"), [(0, 1, 1), (1, -1, 1), (1, 1, 0)])
def test_counts_below_one_are_refused_before_anything_is_written(
    tmp_path: Path, sft: int, train: int, test: int
) -> None:
    with pytest.raises(ConfigError, match="expected at least 1"):
        make_task(tmp_path / "out", seed=0, num_sft=sft, num_train=train, num_eval=test)
    assert not (tmp_path / "out").exists()
