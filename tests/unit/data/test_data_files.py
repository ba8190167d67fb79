from __future__ import annotations

import json
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from groupwise.data import SourceRow, read_rows
from groupwise.errors import DataError

ROWS = [{"question": "2+2?", "answer": "4"}, {"question": "naïve \u2028 π?", "answer": "5"}]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def values(rows: list[SourceRow]) -> list[dict[str, object]]:
    return [row.values for row in rows]


def test_jsonl_keeps_line_numbers_over_blank_lines_bom_crlf_and_unicode_line_ends(tmp_path: Path) -> None:
    lines = [json.dumps(row, ensure_ascii=False) for row in ROWS]
    path = write(tmp_path / "a.jsonl", b"\xef\xbb\xbf" + f"{lines[0]}\r\n\r\n  \n{lines[1]}".encode())
    rows = read_rows(path)
    assert values(rows) == ROWS
    assert [row.where for row in rows] == [f"{path}:1", f"{path}:4"]


def test_json_is_lines_or_an_array_whose_elements_know_their_line(tmp_path: Path) -> None:
    array = write(tmp_path / "a.json", '\n[{"a": "]"},\n\n {"a": [1,\n 2]}, {"a": 3}\n,\n{"a": {}}]\n')
    rows = read_rows(str(array))
    assert values(rows) == [{"a": "]"}, {"a": [1, 2]}, {"a": 3}, {"a": {}}]
    assert [row.where.removeprefix(f"{array}:") for row in rows] == ["2", "4", "5", "7"]
    lines = write(tmp_path / "b.json", "\n".join(json.dumps(row) for row in ROWS))
    assert values(read_rows(lines)) == ROWS


@pytest.mark.parametrize("suffix", ["JSONL", "parquet", "csv"])
def test_every_format_gives_the_same_rows(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    dataset = datasets.Dataset.from_list(ROWS)
    if suffix == "JSONL":
        dataset.to_json(path)
    elif suffix == "parquet":
        dataset.to_parquet(path)
    else:
        dataset.to_csv(path)
    assert values(read_rows(path)) == ROWS


def test_saved_folder_and_its_splits(tmp_path: Path) -> None:
    dataset = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"train": dataset, "test": dataset}).save_to_disk(tmp_path / "both")
    with pytest.raises(DataError, match=r"several splits \(test, train\)"):
        read_rows(tmp_path / "both")
    rows = read_rows(tmp_path / "both" / "train")
    assert values(rows) == ROWS
    assert rows[1].where == f"{tmp_path / 'both' / 'train'}:row 2"
    next((tmp_path / "both" / "train").glob("*.arrow")).write_bytes(b"junk")
    with pytest.raises(DataError, match="not a dataset folder that can be read"):
        read_rows(tmp_path / "both" / "train")


def test_memory_takes_datasets_lists_generators_and_streams() -> None:
    dataset = datasets.Dataset.from_list(ROWS)
    for source in (ROWS, dataset, dataset.with_format("numpy"), dataset.to_iterable_dataset(), (row for row in ROWS)):
        rows = read_rows(source)
        assert values(rows) == ROWS
        assert rows[1].where == "row 2"


def test_limit_reads_no_further(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"a": 1}\n{"a": 2}\nbroken')
    assert values(read_rows(path, limit=2)) == [{"a": 1}, {"a": 2}]


def test_parquet_ignores_folder_names_that_look_like_columns(tmp_path: Path) -> None:
    folder = tmp_path / "split=train"
    folder.mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"a": [1, 2]}), folder / "x.parquet")
    rows = read_rows(folder / "x.parquet")
    assert values(rows) == [{"a": 1}, {"a": 2}]
    assert rows[1].where.endswith("x.parquet:row 2")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", "has no rows"),
        ("a.jsonl", "\n \n", "has no rows"),
        ("a.json", "", "has no rows"),
        ("a.json", "[]", "has no rows"),
        ("a.csv", "a,b\n", "has no rows"),
        ("a.jsonl", '{"a": 1}\n{"a": \n', r"a\.jsonl:2: broken JSON: .* column"),
        ("a.jsonl", '{"a": 1}\n[1]\n', r"a\.jsonl:2: got a JSON list; expected an object"),
        ("a.jsonl", "null", r"a\.jsonl:1: got a JSON NoneType"),
        ("a.jsonl", '{"a": ' + "9" * 5000 + "}", r"a\.jsonl:1: JSON that cannot be read"),
        ("a.jsonl", '{"a": ' + "[" * 200_000, r"a\.jsonl:1: (JSON that cannot|broken JSON)"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xff"}', r"a\.jsonl:2: byte 8 \(0xff\) is not UTF-8"),
        ("a.jsonl", '{"a": 1}'.encode("utf-16"), "is UTF-16"),
        ("a.json", '[{"a": 1},\n{"a": 2]', r"a\.json:2: broken JSON"),
        ("a.json", '[{"a": 1},\n3]', r"a\.json:2: got a JSON int"),
        ("a.csv", "a,b\n1,2\n\n1,2,3\n", r"a\.csv:4: 3 cells, but the header names 2 columns \(a, b\)"),
        ("a.csv", 'a,b\n"1\n1",2\n1\n', r"a\.csv:4: 1 cells"),
        ("a.csv", 'a,b\n"1,2\n', r"a\.csv:2: broken CSV"),
        ("a.csv", "a,a\n1,2\n", r"a\.csv:1: the column 'a' occurs twice"),
        ("a.csv", "a,\n1,2\n", r"a\.csv:1: a column has no name"),
        ("a.csv", b"a,b\n1,2\n\xe9,2\n", r"a\.csv:3: byte 1 \(0xe9\)"),
        ("a.parquet", "not parquet", "is not a Parquet file that can be read"),
        ("a.parquet", "", "is not a Parquet file that can be read"),
        ("a.txt", "x", r'suffix "\.txt"; expected one of \.csv, \.json, \.jsonl, \.parquet'),
    ],
)
def test_bad_files_are_named_with_their_line(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_rows(write(tmp_path / name, content))


def test_csv_accepts_bom_crlf_and_quoted_line_ends(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", b'\xef\xbb\xbfquestion,answer\r\n"2+2,\nor ""so""?",4\r\n3?,3')
    rows = read_rows(path)
    assert values(rows) == [{"question": '2+2,\nor "so"?', "answer": "4"}, {"question": "3?", "answer": "3"}]
    assert [row.where.rsplit(":", 1)[1] for row in rows] == ["2", "4"]


def test_missing_paths_say_what_is_there(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", "{}")
    with pytest.raises(DataError, match=r'did you mean "train\.jsonl"'):
        read_rows(tmp_path / "trian.jsonl")
    with pytest.raises(DataError, match="nor does its folder"):
        read_rows("openai-nobody/gsm8k")
    with pytest.raises(
        DataError, match=r"not one written by datasets' save_to_disk; name one of its files: train\.jsonl"
    ):
        read_rows(tmp_path)
    with pytest.raises(DataError, match=r"empty; set data\.train"):
        read_rows("")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "the list given as data has no rows"),
        ({"train": ROWS, "test": ROWS}, "keys train, test"),
        (datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}), "keys train"),
        ([{"a": 1}, "text"], "row 2 is a str"),
        (17, "the data is a int"),
        (None, "the data is a NoneType"),
    ],
)
def test_bad_memory_is_refused(source: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_rows(source)  # type: ignore[arg-type]


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@given(rows=st.lists(st.dictionaries(st.text(max_size=5), JSON_VALUES, max_size=3), min_size=1, max_size=5))
def test_what_json_writes_is_read_back(rows: list[dict[str, object]], tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("json")
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    assert values(read_rows(write(folder / "a.jsonl", text))) == rows
    assert values(read_rows(write(folder / "b.json", json.dumps(rows, indent=1)))) == rows
