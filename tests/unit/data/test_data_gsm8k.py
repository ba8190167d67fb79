from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from groupwise.data import Gsm8kCounts, convert_gsm8k
from groupwise.errors import DataError

QUESTION = (
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. "
    "How many clips did Natalia sell altogether in April and May?"
)
ANSWER = (
    "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\n"
    "Natalia sold 48+24 = <<48+24=72>>72 clips altogether in April and May.\n#### 72"
)
FIRST = {"question": QUESTION, "answer": ANSWER}
SECOND = {"question": "Größe in £?", "answer": "So:\n#### -1,234.5"}


def lines(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def published(folder: Path, *, train: str | None = None, test: str | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "train.jsonl").write_text(lines(FIRST, SECOND) if train is None else train)
    (folder / "test.jsonl").write_text(lines(FIRST) if test is None else test)
    return folder


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def test_every_field_and_its_order(tmp_path: Path) -> None:
    counts = convert_gsm8k(published(tmp_path / "in"), tmp_path / "new" / "out")
    assert counts == Gsm8kCounts(train=2, test=1)
    train = rows(tmp_path / "new" / "out" / "train.jsonl")
    expected = {
        "data_source": "openai/gsm8k",
        "prompt": [
            {
                "content": QUESTION + ' Let\'s think step by step and output the final answer after "####".',
                "role": "user",
            }
        ],
        "ability": "math",
        "reward_model": {"ground_truth": "72", "style": "rule"},
        "extra_info": {"answer": ANSWER, "index": 0, "question": QUESTION, "split": "train"},
    }
    assert json.dumps(train[0]) == json.dumps(expected), "fields, values and their order"
    assert train[1]["reward_model"]["ground_truth"] == "-1234.5"
    assert train[1]["extra_info"] == {**SECOND, "index": 1, "split": "train"}
    assert rows(tmp_path / "new" / "out" / "test.jsonl")[0]["extra_info"]["split"] == "test"


def test_the_first_final_answer_counts(tmp_path: Path) -> None:
    twice = {"question": "q", "answer": "#### 1,000\n#### 2"}
    convert_gsm8k(published(tmp_path / "in", test=lines(twice)), tmp_path)
    assert rows(tmp_path / "test.jsonl")[0]["reward_model"]["ground_truth"] == "1000"


@pytest.mark.parametrize("inner", ["main", "."])
def test_hugging_face_folder_with_shards_ignores_socratic(tmp_path: Path, inner: str) -> None:
    source = tmp_path / "hub"
    for config, question in ((inner, "main"), ("socratic", "socratic")):
        folder = source / config
        folder.mkdir(parents=True, exist_ok=True)
        for split in ("train", "test"):
            for shard in range(2):
                row = {"question": f"{question} {split} {shard}", "answer": f"#### {shard}"}
                datasets.Dataset.from_list([row]).to_parquet(folder / f"{split}-0000{shard}-of-00002.parquet")
    assert convert_gsm8k(source, tmp_path / "out") == Gsm8kCounts(train=2, test=2)
    questions = [
        (row["extra_info"]["question"], row["extra_info"]["index"]) for row in rows(tmp_path / "out/train.jsonl")
    ]
    assert questions == [("main train 0", 0), ("main train 1", 1)]


def test_running_again_replaces_the_output(tmp_path: Path) -> None:
    source = published(tmp_path / "in")
    convert_gsm8k(source, tmp_path / "out")
    before = (tmp_path / "out" / "train.jsonl").read_bytes()
    convert_gsm8k(source, tmp_path / "out")
    assert (tmp_path / "out" / "train.jsonl").read_bytes() == before
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["test.jsonl", "train.jsonl"]


@pytest.mark.parametrize(
    ("test", "message"),
    [
        (lines(FIRST) + lines({"question": "q", "answer": "72"}), r'test\.jsonl:2: the answer has no "#### <number>"'),
        (lines({"question": "q"}), r'test\.jsonl:1: there is no column "answer" \(of GSM8K\); the row has question'),
        (lines({"question": " ", "answer": "#### 1"}), r'test\.jsonl:1: the column "question" is empty'),
        (lines({"question": "\ud800", "answer": "#### 1"}), r"test\.jsonl:1: .*surrogate"),
        (lines({"question": 1, "answer": "#### 1"}), r"test\.jsonl:1: .*is a number"),
        ("", r"test\.jsonl has no rows"),
        ("{", r"test\.jsonl:1: broken JSON"),
    ],
)
def test_a_bad_row_anywhere_writes_nothing(tmp_path: Path, test: str, message: str) -> None:
    source = published(tmp_path / "in", test=test)
    with pytest.raises(DataError, match=message):
        convert_gsm8k(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_input_is_never_overwritten(tmp_path: Path) -> None:
    source = published(tmp_path / "in")
    (tmp_path / "link").symlink_to(source)
    before = (source / "train.jsonl").read_bytes()
    for out in (source, tmp_path / "in" / ".." / "in", tmp_path / "link"):
        with pytest.raises(DataError, match="would be overwritten; give another output folder"):
            convert_gsm8k(source, out)
    assert (source / "train.jsonl").read_bytes() == before


def test_missing_folders_and_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a folder"):
        convert_gsm8k(tmp_path / "nowhere", tmp_path / "out")
    source = published(tmp_path / "in")
    (source / "test.jsonl").unlink()
    with pytest.raises(DataError, match=r"no test split of GSM8K; expected test\.jsonl"):
        convert_gsm8k(source, tmp_path / "out")
    with pytest.raises(DataError, match="is a file; expected a folder"):
        convert_gsm8k(source, source / "train.jsonl")


def test_the_whole_of_gsm8k_when_present(tmp_path: Path) -> None:
    source = Path(__file__).parents[3] / "../shared/data/gsm8k"
    if not source.is_dir():
        pytest.skip("GSM8K is not here")
    assert convert_gsm8k(source, tmp_path) == Gsm8kCounts(train=7473, test=1319)
    first = rows(tmp_path / "train.jsonl")[0]
    assert first["extra_info"]["question"] == QUESTION
    assert first["extra_info"]["answer"] == ANSWER
