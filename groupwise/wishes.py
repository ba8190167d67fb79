"""What somebody beside a run asks of it: a file in its directory, which the run takes away when it has seen it."""

from __future__ import annotations

import logging
from collections.abc import Collection
from pathlib import Path
from typing import Literal, TypeAlias, get_args

from groupwise.files import write_text_atomic

logger = logging.getLogger(__name__)

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
    """What was asked since; each wish is taken once. One that cannot be taken away would come again and again: it is
    passed over, and the log says so."""
    found: list[WishName] = []
    for name, file in FILES.items():
        try:
            (run / file).unlink()
        except FileNotFoundError:
            continue
        except OSError as error:
            logger.warning("%s is passed over: it cannot be taken away (%s); remove it", run / file, error.strerror)
            continue
        found.append(name)
    return found
