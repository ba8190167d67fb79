"""Files and datasets in, rows out; each row remembers where it came from, so that every later error can say so.

Knows formats, nothing of prompts. JSONL, JSON, CSV and Parquet files, folders written by datasets' `save_to_disk`, and
anything in memory that yields dicts.
"""

from __future__ import annotations

import csv
import json
import logging
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

from groupwise.errors import DataError, nearest

logger = logging.getLogger(__name__)

Source: TypeAlias = str | Path | Iterable[Any]
"""A path, or rows in memory, each a dict: a list, a `datasets.Dataset`, a streaming dataset, a generator."""

_UTF8_BOM = b"\xef\xbb\xbf"
_UTF16_BOMS = (b"\xff\xfe", b"\xfe\xff")
_BETWEEN_JSON_VALUES = re.compile(r"[ \t\r\n,]*")


@dataclass(frozen=True, slots=True)
class SourceRow:
    """One row and its place.

    Attributes:
        values: column name to value, as the file has them.
        where: file and line (`train.jsonl:17`), or row (`train.parquet:row 17`, `row 17`); counted from 1.

    Example:
        SourceRow(values={"question": "2+2?", "answer": "4"}, where="train.jsonl:17")
    """

    values: dict[str, Any]
    where: str


def read_rows(source: Source, *, limit: int | None = None) -> list[SourceRow]:
    """Read all rows, or the first `limit`. Rows that were read before (`SourceRow`) pass as they are.

    Raises:
        DataError: the source is missing, empty, of an unknown kind or broken; the message names file and line.
    """
    rows = list(islice(_rows(source), limit))
    if not rows:
        name = str(source) if isinstance(source, str | Path) else f"the {type(source).__name__} given as data"
        raise DataError(f"{name} has no rows; expected at least one")
    return rows


def read_for_training(source: Source, *, needed: int | None, setting: str) -> list[SourceRow]:
    """Read all rows; of a source without a length, which may never end, as many as a run asks for.

    Args:
        needed: rows that the run's steps ask for; None where only the data could say how many steps there are.
        setting: what would decide them.

    Raises:
        DataError: as `read_rows`, or the source has no length and nothing bounds what is read of it.
    """
    if isinstance(source, str | Path | Sized) or not isinstance(source, Iterable):
        return read_rows(source)
    if needed is None:
        raise DataError(
            f"the {type(source).__name__} given as data has no length and may never end; set {setting}, or give a list "
            "of its rows"
        )
    rows = read_rows(source, limit=needed)
    logger.info("read %d rows of a stream, of %d that %s asks for", len(rows), needed, setting)
    return rows


def _rows(source: Source) -> Iterator[SourceRow]:
    if isinstance(source, str | Path):
        return _rows_of_path(source)
    if isinstance(source, Mapping):
        names = ", ".join(str(key) for key in source)
        raise DataError(f"the data is one mapping with the keys {names}; expected rows. Pass one split, or a list")
    if not isinstance(source, Iterable):
        raise DataError(f"the data is a {type(source).__name__}; expected a path, a dataset or an iterable of dicts")
    return _rows_in_memory(_without_format(source), prefix="")


def _without_format(source: Any) -> Iterable[Any]:
    # Who holds a dataset has imported the library already; nobody else should pay for its import.
    datasets: Any = sys.modules.get("datasets")
    if datasets is not None and isinstance(source, datasets.Dataset | datasets.IterableDataset):
        return source.with_format(None)
    return source


def _rows_in_memory(source: Iterable[Any], *, prefix: str) -> Iterator[SourceRow]:
    for number, row in enumerate(source, 1):
        where = f"{prefix}row {number}"
        if isinstance(row, SourceRow):
            yield row
            continue
        if not isinstance(row, Mapping):
            raise DataError(f"{where} is a {type(row).__name__}; expected a dict of column names and values")
        yield SourceRow(dict(row), where)


def _rows_of_path(source: str | Path) -> Iterator[SourceRow]:
    if not str(source).strip():
        raise DataError("the path of the data is empty; set data.train (or data.eval) to a file or folder")
    path = Path(source)
    if path.is_dir():
        return _read_folder(path)
    if not path.exists():
        raise DataError(_missing(path))
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        known = ", ".join(sorted(_READERS))
        raise DataError(
            f'{path} has the suffix "{path.suffix}"; expected one of {known}, or a folder written by save_to_disk. '
            "Convert or rename the file"
        )
    return reader(path)


def _missing(path: Path) -> str:
    if not path.parent.is_dir():
        return (
            f"{path} does not exist, nor does its folder; expected a file or folder on this machine. "
            "A dataset of the Hugging Face Hub must be downloaded first"
        )
    near = nearest(path.name, (other.name for other in path.parent.iterdir()), '; did you mean "{}"?')
    return f"{path} does not exist{near}"


def _lines(path: Path) -> Iterator[str]:
    """Lines of a UTF-8 file, ends kept. Only `\\n` ends a line: JSON strings may hold other Unicode line ends."""
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                if number == 1 and raw.startswith(_UTF16_BOMS):
                    raise DataError(f"{path} is UTF-16; expected UTF-8. Save it as UTF-8")
                yield _decode(raw.removeprefix(_UTF8_BOM) if number == 1 else raw, f"{path}:{number}")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


def _decode(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        bad = f"byte {error.start + 1} (0x{raw[error.start]:02x})"
        raise DataError(f"{where}: {bad} is not UTF-8; save the file as UTF-8") from error


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where}: broken JSON: {error.msg} at column {error.colno}; expected one JSON object per line"
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: JSON that cannot be read: {error}") from error


def _object(value: Any, where: str) -> SourceRow:
    if not isinstance(value, dict):
        raise DataError(f"{where}: got a JSON {type(value).__name__}; expected an object of column names and values")
    return SourceRow(value, where)


def _read_jsonl(path: Path) -> Iterator[SourceRow]:
    for number, line in enumerate(_lines(path), 1):
        if line.strip():
            where = f"{path}:{number}"
            yield _object(_parse(line, where), where)


def _read_json(path: Path) -> Iterator[SourceRow]:
    first = next((line.lstrip()[0] for line in _lines(path) if line.strip()), "")
    return _read_json_array(path) if first == "[" else _read_jsonl(path)


def _read_json_array(path: Path) -> Iterator[SourceRow]:
    text = "".join(_lines(path))
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: broken JSON: {error.msg} at column {error.colno}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: JSON that cannot be read: {error}") from error
    # The text is valid, so a second walk only has to learn on which line each element starts.
    decoder = json.JSONDecoder()
    position, line, counted = text.index("[") + 1, 1, 0
    while True:
        gap = _BETWEEN_JSON_VALUES.match(text, position)
        assert gap is not None, "a pattern that matches the empty string always matches"
        position = gap.end()
        if text[position] == "]":
            return
        line, counted = line + text.count("\n", counted, position), position
        value, position = decoder.raw_decode(text, position)
        yield _object(value, f"{path}:{line}")


def _read_csv(path: Path) -> Iterator[SourceRow]:
    reader = csv.reader(_lines(path), strict=True)
    header: list[str] | None = None
    start = 1
    try:
        for cells in reader:
            where, start = f"{path}:{start}", reader.line_num + 1
            if not cells:
                continue
            if header is None:
                header = _csv_header(cells, where)
            elif len(cells) != len(header):
                raise DataError(
                    f"{where}: {len(cells)} cells, but the header names {len(header)} columns ({', '.join(header)}); "
                    "put quotes around cells that hold commas, quotes or line ends"
                )
            else:
                yield SourceRow(dict(zip(header, cells, strict=True)), where)
    except csv.Error as error:
        raise DataError(f"{path}:{start}: broken CSV: {error}; JSONL has no such trouble with quotes") from error


def _csv_header(cells: list[str], where: str) -> list[str]:
    names = [cell.strip() for cell in cells]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice or "" in names:
        fault = f"the column {twice[0]!r} occurs twice" if twice else "a column has no name"
        raise DataError(f"{where}: {fault}; the first line must name each column once")
    return names


def _read_parquet(path: Path) -> Iterator[SourceRow]:
    import pyarrow
    import pyarrow.parquet

    try:
        # Not read_table: that would turn folder names such as split=train into columns.
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=4096):
                for values in batch.to_pylist():
                    number += 1
                    yield SourceRow(values, f"{path}:row {number}")
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a Parquet file that can be read: {_first_line(error)}") from error


def _read_folder(path: Path) -> Iterator[SourceRow]:
    if (path / "dataset_dict.json").is_file():
        splits = ", ".join(sorted(entry.name for entry in path.iterdir() if entry.is_dir()))
        raise DataError(f"{path} holds several splits ({splits}); name one of these folders, such as {path}/train")
    if not (path / "state.json").is_file() or not (path / "dataset_info.json").is_file():
        files = sorted(entry.name for entry in path.iterdir() if entry.suffix.lower() in _READERS)
        hint = f"; name one of its files: {', '.join(files[:5])}" if files else ""
        raise DataError(f"{path} is a folder, but not one written by datasets' save_to_disk{hint}")
    import datasets
    import pyarrow

    try:
        dataset = datasets.load_from_disk(str(path))
    except (pyarrow.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is not a dataset folder that can be read: {_first_line(error)}") from error
    assert isinstance(dataset, datasets.Dataset), "a folder of several splits was refused above"
    return _rows_in_memory(dataset.with_format(None), prefix=f"{path}:")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


_READERS: dict[str, Callable[[Path], Iterator[SourceRow]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
