"""What somebody beside a run asks of it: a file in its directory, which the run takes away when it has seen it."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Literal, TypeAlias, get_args

from groupwise.files import file_error, write_text_atomic

WishName: TypeAlias = Literal["save", "stop"]
"""A checkpoint after the step; the step's end, with one."""

FILES = {name: f"wish.{name}" for name in get_args(WishName)}


def leave_wish(run: Path, name: WishName) -> None:
    """Ask the run that goes on in this directory; it looks after each step.

    Raises:
        FileError: nothing can be written there.
    """
    write_text_atomic(run / FILES[name], "")


def take_wishes(run: Path) -> Collection[WishName]:
    """What was asked since; each wish is taken once.

    Raises:
        FileError: one cannot be taken away, and would come again.
    """
    found: list[WishName] = []
    for name, file in FILES.items():
        try:
            (run / file).unlink()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise file_error(error, run / file, doing="removed") from error
        found.append(name)
    return found
