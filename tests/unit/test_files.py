"""Files: errors of the operating system as sentences, nothing written through a link, modes as the umask says."""

from __future__ import annotations

import errno
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from groupwise.errors import FileError
from groupwise.files import (
    LogFile,
    append_rows,
    file_error,
    json_line,
    json_safe,
    make_anew,
    use_umask,
    write_bytes_atomic,
    write_text_atomic,
    writing,
)


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o027)
    yield
    os.umask(before)


@pytest.mark.parametrize(
    ("number", "words", "code"),
    [
        (errno.ENOSPC, "the disk is full", 1),
        (errno.EDQUOT, "quota", 1),
        (errno.EFBIG, "larger", 1),
        (errno.ENOENT, "its folder was removed", 1),
        (errno.EROFS, "read-only", 2),
        (errno.EACCES, "permission is denied", 2),
        (errno.ENAMETOOLONG, "too long", 2),
        (errno.ENOTDIR, "is a file", 2),
        (errno.ELOOP, "symbolic link", 2),
    ],
)
def test_an_error_is_a_sentence_with_the_files_name(number: int, words: str, code: int) -> None:
    found = file_error(OSError(number, "as the system says it", "runs/a/ledger.jsonl"), doing="written")
    assert str(found).startswith("runs/a/ledger.jsonl cannot be written: ")
    assert words in str(found)
    assert found.exit_code == code
    assert found.errno == number
    assert isinstance(found, OSError)


def test_safetensors_errors_have_their_number_in_the_text(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="model cannot be written: the disk is full"), writing(tmp_path / "model"):
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")
    with pytest.raises(RuntimeError, match=r"^another$"), writing(tmp_path / "model"):
        raise RuntimeError("another")


def test_a_folder_that_went_away_and_one_that_is_a_file(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"gone/rows\.jsonl cannot be written: it is not there"):
        append_rows(tmp_path / "gone" / "rows.jsonl", [{}])
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="a part of the path is a file"):
        write_text_atomic(tmp_path / "file" / "rows.jsonl", "")
    with pytest.raises(FileError, match="too long"):
        write_text_atomic(tmp_path / ("a" * 300), "")


@pytest.mark.parametrize("dangling", [False, True])
def test_a_temporary_file_is_not_written_through_a_link(tmp_path: Path, dangling: bool) -> None:
    victim = tmp_path / "victim"
    if not dangling:
        victim.write_text("mine")
    (tmp_path / ".config.json.tmp").symlink_to(victim)
    write_text_atomic(tmp_path / "config.json", "ours")
    assert (tmp_path / "config.json").read_text() == "ours"
    assert not (tmp_path / "config.json").is_symlink()
    assert not (tmp_path / ".config.json.tmp").is_symlink()
    assert (victim.read_text() == "mine") if not dangling else (not victim.exists())


def test_a_stale_temporary_file_is_taken_over(tmp_path: Path) -> None:
    (tmp_path / ".a.tmp").write_text("half a fi")
    write_bytes_atomic(tmp_path / "a", b"whole")
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


def test_rows_and_records_are_not_appended_through_a_link(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    for name in ("metrics.jsonl", "log.txt"):
        (tmp_path / name).symlink_to(victim)
    with pytest.raises(FileError, match=r"metrics.jsonl cannot be written: it is a symbolic link"):
        append_rows(tmp_path / "metrics.jsonl", [{"step": 1}])
    handler = LogFile(tmp_path / "log.txt")
    handler.handle(logging.LogRecord("groupwise", logging.INFO, "", 1, "hello", None, None))
    handler.close()
    assert victim.read_text() == "mine"


def test_a_folder_in_place_of_a_link_leaves_what_it_led_to(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").write_text("mine")
    (tmp_path / ".final.tmp").symlink_to(tmp_path / "elsewhere")
    make_anew(tmp_path / ".final.tmp")
    assert not (tmp_path / ".final.tmp").is_symlink()
    assert (tmp_path / "elsewhere" / "file").read_text() == "mine"


@pytest.mark.usefixtures("umask")
def test_files_have_the_umasks_mode(tmp_path: Path) -> None:
    write_text_atomic(tmp_path / "a", "")
    append_rows(tmp_path / "b", [{}])
    (tmp_path / "folder").mkdir()
    for name in ("c", "folder/d"):
        os.close(os.open(tmp_path / name, os.O_CREAT | os.O_WRONLY, 0o600))
    use_umask(tmp_path)
    modes = {file.name: file.stat().st_mode & 0o777 for file in tmp_path.rglob("*") if file.is_file()}
    assert modes == dict.fromkeys("abcd", 0o640)
    assert os.umask(0o027) == 0o027


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=())),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text(st.characters()), inner),
    max_leaves=20,
)


@given(row=st.dictionaries(st.text(st.characters(exclude_categories=())), JSON_VALUES))
def test_a_line_reads_back_as_the_row_with_null_for_what_json_cannot_say(row: dict[str, Any]) -> None:
    line = json_line(row)
    assert line.endswith("\n")
    assert "\n" not in line[:-1]
    assert line.encode("utf-8")
    assert json.loads(line, parse_constant=pytest.fail) == json.loads(json.dumps(json_safe(row), allow_nan=False))
