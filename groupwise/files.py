"""Small things about files that several layers need: atomic writes, valid JSON, and JSON Lines cut at a step."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from groupwise.errors import DataError
from groupwise.texts import encodable


def json_safe(value: Any) -> Any:
    """The same value as every strict reader takes it: NaN and infinities, for which JSON has no word, become None, and
    texts are `encodable`."""
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, str):
        return encodable(value)
    if isinstance(value, Mapping):
        return {encodable(str(key)): json_safe(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_safe(item) for item in value]
    return value


def sync_folder(path: Path) -> None:
    """Make the folder's entries durable: a rename survives a power cut only after this."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes_atomic(path: Path, content: bytes) -> None:
    """Replace the file as one act: readers see the old content or the new, also after a crash at any instant.

    A file has one writer. What a killed one leaves, `.<name>.tmp`, the next write takes over.

    Raises:
        OSError: the folder is missing, the disk is full, …; the old file is untouched.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_text_atomic(path: Path, text: str) -> None:
    """Write the text as UTF-8, and what UTF-8 cannot say written out (`encodable`)."""
    write_bytes_atomic(path, encodable(text).encode("utf-8"))


def write_json_atomic(path: Path, value: Any) -> None:
    """Write indented, strictly valid JSON (NaN becomes null)."""
    write_text_atomic(path, json.dumps(json_safe(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def json_line(row: Mapping[str, Any]) -> str:
    """One JSON Lines row, with its newline (NaN becomes null)."""
    return json.dumps(json_safe(row), ensure_ascii=False, allow_nan=False) + "\n"


def append_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append rows to a JSON Lines file and make them durable before returning."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json_line(row) for row in rows)
        file.flush()
        os.fsync(file.fileno())


def truncate_rows(path: Path, step: int) -> int:
    """Drop the rows of a JSON Lines file whose `step` is above `step`, atomically; returns how many went.

    A last line without a newline is what a killed process leaves behind: it is dropped too. A missing file has no rows.

    Raises:
        DataError: a complete line is not a JSON object with a whole number `step`.
    """
    if not path.exists():
        return 0
    lines = path.read_bytes().splitlines(keepends=True)
    kept: list[bytes] = []
    for number, line in enumerate(lines, start=1):
        if line.endswith(b"\n") and _step_of(line, where=f"{path}:{number}") <= step:
            kept.append(line)
    if len(kept) < len(lines):
        write_bytes_atomic(path, b"".join(kept))
    return len(lines) - len(kept)


def last_step(path: Path) -> int:
    """The highest `step` of the whole lines of a JSON Lines file; 0 where there is none, or a damaged one."""
    if not path.exists():
        return 0
    lines = [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    try:
        return max((_step_of(line, where=f"{path}") for line in lines), default=0)
    except DataError:
        return 0


def _step_of(line: bytes, *, where: str) -> int:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(
            f"{where}: got a line that is not JSON ({error}); expected one object per line; remove or mend the line"
        ) from None
    step = row.get("step") if isinstance(row, dict) else None
    if not isinstance(step, int) or isinstance(step, bool):
        raise DataError(f"{where}: got a line without a whole number `step`; remove or mend the line")
    return step
