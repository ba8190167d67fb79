"""Small things about files that several layers need: atomic writes, valid JSON, JSON Lines cut at a step, and errors
of the operating system as sentences.

Nothing is written through a symbolic link in a run's place: who may make one there could have us overwrite any file.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pydantic_core import PydanticSerializationError, to_json

from groupwise.errors import EXIT_FAILURE, EXIT_USER, DataError, FileError, GroupwiseError
from groupwise.texts import encodable

_CAUSES = {
    errno.ENOSPC: "the disk is full; free some space there",
    errno.EDQUOT: "your quota of the disk is used up; free some space there",
    errno.EFBIG: "the file would be larger than this disk or process may have; raise the limit, or use another",
    errno.EIO: "the disk failed; look at it, or use another one",
    errno.ENOENT: "it is not there, or its folder was removed; put it back",
    errno.EROFS: "the disk is read-only; use another place",
    errno.EACCES: "permission is denied; change the permissions, or use another place",
    errno.EPERM: "permission is denied; change the permissions, or use another place",
    errno.ENAMETOOLONG: "the name is too long; use a shorter one",
    errno.ENOTDIR: "a part of the path is a file; expected folders",
    errno.EISDIR: "it is a folder; expected a file",
    errno.EEXIST: "something else is there; move it away",
    errno.ENOTEMPTY: "something else is there; move it away",
    errno.ELOOP: "it is a symbolic link, and nothing is written or read through one here; put a file in its place",
    errno.ETXTBSY: "it is being executed; use another place",
    errno.EMFILE: "this process has too many open files; raise `ulimit -n`",
    errno.ENFILE: "the system has too many open files; close some",
}
_FAILURES = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENOENT, errno.EMFILE, errno.ENFILE, errno.ESTALE}
)

_OS_ERROR = re.compile(r"\(os error (\d+)\)")


def file_error(error: OSError, path: Path | str | None = None, *, doing: str = "used") -> FileError:
    """The sentence for an error of the operating system.

    Args:
        path: what the error does not name itself.

    Example:
        str(file_error(OSError(errno.ENOSPC, "")), "runs/a/ledger.jsonl", doing="written"))
        # runs/a/ledger.jsonl cannot be written: the disk is full; free some space there
    """
    if isinstance(error, FileError):
        return error
    place = error.filename if path is None else path
    place = os.fsdecode(place) if isinstance(place, str | bytes | os.PathLike) else "a file"
    cause = _CAUSES.get(error.errno or 0) or error.strerror or str(error) or type(error).__name__
    found = FileError(f"{place} cannot be {doing}: {cause}")
    found.errno = error.errno
    found.exit_code = EXIT_FAILURE if error.errno in _FAILURES else EXIT_USER
    return found


@contextmanager
def writing(path: Path, *, hint: str = "") -> Iterator[None]:
    """Within it, what goes wrong with files is said of `path`, as one sentence.

    Args:
        hint: stands after the sentence.

    Raises:
        FileError: in place of any `OSError`, and of safetensors' own errors.
    """
    try:
        yield
    except GroupwiseError:
        raise
    except OSError as error:
        found = file_error(error, path, doing="written")
        raise _with_hint(found, hint) from error
    except Exception as error:
        # safetensors' errors are no OSErrors: their text has the number. Whatever else it is goes on.
        number = _OS_ERROR.search(str(error))
        if number is None:
            raise
        raise _with_hint(file_error(OSError(int(number[1]), str(error)), path, doing="written"), hint) from error


def _with_hint(error: FileError, hint: str) -> FileError:
    if not hint:
        return error
    longer = FileError(f"{error}{hint}")
    longer.errno, longer.exit_code = error.errno, error.exit_code
    return longer


def open_new(path: Path) -> int:
    """A descriptor of a new file to write, in place of what a killed writer left there; never through a link."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
    try:
        return os.open(path, flags, 0o666)
    except FileExistsError:
        path.unlink()
        return os.open(path, flags, 0o666)


def open_to_append(path: Path) -> int:
    """A descriptor to append with; a link is refused.

    Raises:
        OSError: with ELOOP, the file is a symbolic link.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
    return os.open(path, flags, 0o666)


class LogFile(logging.FileHandler):
    """Appends records to a file, which is no link. What cannot be written (a full disk) is told once, and ends nothing:
    the run's other files decide whether it goes on."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, encoding="utf-8", errors="backslashreplace", delay=True)
        self._told = False

    def _open(self) -> Any:
        return open(open_to_append(Path(self.baseFilename)), "a", encoding=self.encoding, errors=self.errors)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            super().emit(record)
        except OSError:  # from opening it, which its parent does outside of its own care
            self.handleError(record)

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exception()
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._told and sys.stderr is not None:
            self._told = True
            sys.stderr.write(f"warning: {file_error(error, self.baseFilename, doing='written')}\n")

    def close(self) -> None:
        try:
            super().close()
        except OSError:  # what was not written goes on waiting in its buffer
            self.stream = None
            logging.Handler.close(self)


def use_umask(folder: Path) -> None:
    """Give every file under `folder` the mode of a new file: some libraries write for the owner alone."""
    mask = os.umask(0o077)
    os.umask(mask)
    for place, _, names in os.walk(folder):
        for name in names:
            file = Path(place, name)
            if not file.is_symlink():
                file.chmod(0o666 & ~mask)


def make_anew(folder: Path) -> None:
    """An empty folder, in place of what a killed writer left there; of a link there, not what it leads to."""
    if folder.is_symlink() or folder.is_file():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)
    folder.mkdir()


def refuse_link(path: Path) -> None:
    """Raises OSError, with ELOOP, where the path is a symbolic link."""
    if path.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))


def leads_outside(path: Path, folder: Path) -> bool:
    """Whether the path, links followed, is no longer in the folder."""
    return not path.resolve().is_relative_to(folder.resolve())


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
        kinds = set(map(type, value))  # a column of numbers is the common case, and long
        if kinds == {int} or (kinds == {float} and all(map(math.isfinite, value))):
            return list(value)
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
        FileError: the folder is missing, the disk is full, …; the old file is untouched.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with writing(path):
        try:
            with open(open_new(temporary), "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
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
    return _json_bytes(row).decode()


def _json_bytes(row: Mapping[str, Any]) -> bytes:
    try:
        return to_json(row, inf_nan_mode="null") + b"\n"
    except PydanticSerializationError:  # half a surrogate pair, or a kind that JSON does not have
        text = json.dumps(json_safe(row), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        return text.encode() + b"\n"


def append_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append rows to a JSON Lines file and make them durable before returning.

    Raises:
        FileError: they could not be written; some may be in the file.
    """
    with writing(path), open(open_to_append(path), "ab") as file:
        file.writelines(map(_json_bytes, rows))
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
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except OSError as error:
        raise file_error(error, path, doing="read") from error
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
