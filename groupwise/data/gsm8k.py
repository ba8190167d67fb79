"""GSM8K as published to the RL format: one JSON object per question, with the number after `####` as ground truth.

Source of the data: Cobbe et al., "Training Verifiers to Solve Math Word Problems", 2021.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from groupwise.data.files import SourceRow, read_rows
from groupwise.data.rows import missing_column, text_problem
from groupwise.errors import DataError
from groupwise.files import json_line, write_text_atomic

INSTRUCTION = ' Let\'s think step by step and output the final answer after "####".'
SPLITS = ("train", "test")
_FINAL_ANSWER = re.compile(r"#### (\-?[0-9\.\,]+)")


@dataclass(frozen=True, slots=True)
class Gsm8kCounts:
    """Rows written per split.

    Example:
        Gsm8kCounts(train=7473, test=1319)
    """

    train: int
    test: int


def convert_gsm8k(input_dir: str | Path, out_dir: str | Path) -> Gsm8kCounts:
    """Write `train.jsonl` and `test.jsonl` in the RL format to `out_dir`; both are converted before either is written.

    Args:
        input_dir: holds train.jsonl and test.jsonl as OpenAI publishes them, or is a downloaded Hugging Face folder
            with Parquet files, in `main/` or at its top.

    Raises:
        DataError: a file is missing, a row lacks a question or `#### <number>`, or the output would replace the input.
    """
    source, target = Path(input_dir), Path(out_dir)
    if not source.is_dir():
        raise DataError(
            f"{source} is not a folder; expected one with GSM8K's train.jsonl and test.jsonl, or Parquet files"
        )
    if target.exists() and not target.is_dir():
        raise DataError(f"{target} is a file; expected a folder to write train.jsonl and test.jsonl to")
    inputs = {split: _split_files(source, split) for split in SPLITS}
    outputs = {split: target / f"{split}.jsonl" for split in SPLITS}
    taken = {file.resolve() for files in inputs.values() for file in files}
    for output in outputs.values():
        if output.resolve() in taken:
            raise DataError(f"{output} is an input file and would be overwritten; give another output folder")
    lines = {split: _convert_split(files, split) for split, files in inputs.items()}
    try:
        target.mkdir(parents=True, exist_ok=True)
        for split, output in outputs.items():
            write_text_atomic(output, "".join(lines[split]))
    except OSError as error:
        raise DataError(f"{target} cannot be written: {error.strerror or error}") from error
    return Gsm8kCounts(train=len(lines["train"]), test=len(lines["test"]))


def convert_row(row: SourceRow, index: int, *, split: str) -> dict[str, Any]:
    """One question in the RL format; `index` is its position in the split.

    Raises:
        DataError: question or answer is missing or no text, or the answer has no `#### <number>`.
    """
    question, answer = _text(row, "question"), _text(row, "answer")
    found = _FINAL_ANSWER.search(answer)
    if found is None:
        raise DataError(f'{row.where}: the answer has no "#### <number>", so it has no ground truth: {answer[-60:]!r}')
    return {
        "data_source": "openai/gsm8k",
        "prompt": [{"content": question + INSTRUCTION, "role": "user"}],
        "ability": "math",
        "reward_model": {"ground_truth": found.group(1).replace(",", ""), "style": "rule"},
        "extra_info": {"answer": answer, "index": index, "question": question, "split": split},
    }


def _convert_split(files: list[Path], split: str) -> list[str]:
    rows = [row for file in files for row in read_rows(file)]
    return [json_line(convert_row(row, index, split=split)) for index, row in enumerate(rows)]


def _split_files(source: Path, split: str) -> list[Path]:
    for folder in (source / "main", source):
        plain = folder / f"{split}.jsonl"
        found = [plain] if plain.is_file() else sorted(folder.glob(f"{split}-*.parquet"))
        if found:
            return found
    raise DataError(
        f"{source} has no {split} split of GSM8K; expected {split}.jsonl, main/{split}-*.parquet or {split}-*.parquet. "
        "Download the data set again, or give the folder that holds these files"
    )


def _text(row: SourceRow, name: str) -> str:
    if name not in row.values:
        raise DataError(f"{row.where}: {missing_column(name, row.values, setting='of GSM8K')}")
    problem = text_problem(row.values[name], f'the column "{name}"')
    if problem is not None:
        raise DataError(f"{row.where}: {problem}")
    return row.values[name]
