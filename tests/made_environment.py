"""An environment's file, as a user writes one."""

from __future__ import annotations

_NODS = """
from groupwise.types import Done, Reply


class Nods:
    def __init__(self, *_, **__):
        self.turns = 0

    def begin(self, prompt, key):
        return None

    def answer(self, turn):
        self.turns += 1
        return Reply(text=" ok "{turn}) if self.turns < 3 else Done({done})

    def close(self):
        pass


def make(*_, **__):
    return Nods()
"""


def nods(*, turn: str = "None", done: str = "None") -> str:
    """Two answers of "ok", then the end.

    Args:
        turn, done: rewards of an answered turn and of the end, as expressions of `turn` and `self.turns`.
    """
    return _NODS.replace("{turn}", f", reward={turn}").replace("{done}", f"reward={done}")
