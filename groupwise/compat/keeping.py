"""What lies where a program writes again is moved aside under a numbered name, and never deleted unless asked."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterable
from fnmatch import fnmatch
from pathlib import Path

from groupwise.errors import ConfigError

logger = logging.getLogger(__name__)

ASIDE = "earlier-"
CARD = "README.md"

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*", "config.json", "adapter_config.json")
"""Files that would make another model of a folder if they stayed beside what is saved into it."""

_UNFINISHED = ".saving-model"


class Place:
    """A folder that a program writes into, which may hold what an earlier one left.

    Args:
        replace: the program asked for that to be deleted.

    Example:
        place = Place("outputs")
        place.free(["model.safetensors"])  # now outputs/earlier-1/model.safetensors, where there was one
        place.wrote(["model.safetensors"])  # this program's own, which its next save replaces
    """

    def __init__(self, folder: str | Path, *, replace: bool = False) -> None:
        self.folder = Path(folder)
        self.replace = replace
        self._own: set[str] = set()
        self._aside: Path | None = None

    @property
    def own(self) -> frozenset[str]:
        """What this program wrote there."""
        return frozenset(self._own)

    def wrote(self, names: Iterable[str]) -> None:
        """These are this program's own from now on."""
        self._own.update(names)

    def forget(self) -> None:
        """What this program wrote belongs to an earlier run from now on."""
        self._own.clear()
        self._aside = None

    def free(self, names: Iterable[str]) -> None:
        """Make room for these: what another program left is moved aside, this program's own is removed.

        Raises:
            ConfigError: the folder cannot be written to.
        """
        try:
            self._free(names)
        except OSError as error:
            raise ConfigError(
                f"{self.folder}: what an earlier run left there cannot be moved aside: {error}; choose another folder"
            ) from error

    def _free(self, names: Iterable[str]) -> None:
        there = [name for name in dict.fromkeys(names) if os.path.lexists(self.folder / name)]
        foreign = [name for name in there if name not in self._own]
        for name in there if self.replace else [name for name in there if name in self._own]:
            _remove(self.folder / name)
        if not foreign:
            return
        if self.replace:
            logger.warning("%s: deleted, as the program asks: %s", self.folder, _listed(foreign))
            return
        place = self._make_room(foreign)
        for name in foreign:
            os.replace(self.folder / name, place / name)
        logger.warning("%s: what an earlier run left is now in %s: %s", self.folder, place, _listed(foreign))

    def save(self, write: Callable[[Path], None]) -> None:
        """Put a model into the folder.

        Args:
            write: writes it into a new folder that it is given.
        """
        new = self.folder / _UNFINISHED
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        try:
            if (self.folder / CARD).is_file():  # peft adds to it
                shutil.copy2(self.folder / CARD, new / CARD)
            write(new)
            names = sorted(path.name for path in new.iterdir())
            stale = [path.name for path in self.folder.iterdir() if any(fnmatch(path.name, p) for p in _WEIGHTS)]
            self.free([name for name in (*names, *stale) if name != CARD])
            for name in names:
                os.replace(new / name, self.folder / name)
            self.wrote(names)
        finally:
            shutil.rmtree(new, ignore_errors=True)

    def _make_room(self, names: list[str]) -> Path:
        """The folder that this program put earlier things into, or a new one where these names are taken."""
        found = self._aside
        if found is not None and found.is_dir() and not any(os.path.lexists(found / name) for name in names):
            return found
        number = 1
        while True:
            place = self.folder / f"{ASIDE}{number}"
            try:
                place.mkdir()
            except FileExistsError:
                number += 1
                continue
            self._aside = place
            return place


_PLACES: dict[Path, Place] = {}


def place_of(folder: str | Path) -> Place:
    """The folder's one place in this process: what the program saved there, it replaces when it saves there again."""
    return _PLACES.setdefault(Path(folder).resolve(), Place(folder))


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:5])
    return f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown
