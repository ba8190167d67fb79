"""What is written appears whole or not at all, and never over anything."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from safetensors import SafetensorError

from groupwise.errors import ConfigError, ExportError, FileError
from groupwise.files import use_umask, writing


def check_new_folder(out: Path) -> None:
    """Refuse to write over anything but an empty folder.

    Raises:
        ConfigError: something is there.
    """
    if not (out.is_dir() and not any(out.iterdir())):
        _check_absent(out)


def check_new_file(out: Path) -> None:
    """Refuse to write over anything.

    Raises:
        ConfigError: something is there.
    """
    if out.is_dir():
        raise ConfigError(f"{out} is a folder; expected a new file, such as --out {out / 'NAME'}")
    _check_absent(out)


@contextmanager
def new_place(out: Path) -> Iterator[Path]:
    """Where to write what becomes `out`, a file or a folder, in one act at the end.

    Raises:
        ExportError: the disk is full, the place cannot be written, …; nothing is left.
    """
    try:
        with writing(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            with TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent, ignore_cleanup_errors=True) as folder:
                place = Path(folder, out.name)
                yield place
                use_umask(Path(folder))
                os.replace(place, out)
    except (FileError, SafetensorError) as error:
        raise ExportError(f"{error}; nothing is left of it") from error


def _check_absent(out: Path) -> None:
    if out.exists() or out.is_symlink():
        raise ConfigError(f"{out} exists; give a new place with --out, or delete this one")
