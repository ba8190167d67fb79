"""The tables of docs/migrate.md: `python -m groupwise.compat.trl.reference`."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from itertools import groupby

from groupwise.compat.trl.settings import GRPO, SFT, Setting
from groupwise.compat.trl.surface import GRPO_MEMBERS, SFT_MEMBERS
from groupwise.config import Config
from groupwise.config.values import literal

_SETTING = re.compile(rf"(?<![\w.'])(?:{'|'.join(Config.model_fields)})\.[\w.]*\w|groupwise=\{{[^}}]*\}}")
_ORDER = ("same", "acts", "refused", "hint")
_MEMBERS = {
    "hook": "there, and may be overridden",
    "here": "there",
    "argument": "reads as the argument",
    "constant": "a constant",
    "refused": "refused",
}
_SAYS = {"same": "is", "acts": "decides", "refused": "refused, but for", "hint": "a hint"}


def render_tables() -> str:
    """GRPOConfig's arguments, and those of SFTConfig that are not the same there."""
    own = {name: setting for name, setting in SFT.items() if GRPO.get(name) != setting}
    between = "SFTConfig has the same arguments where it has them in TRL, and:"
    return f"`GRPOConfig`:\n\n{_table(GRPO)}\n{between}\n\n{_table(own)}"


def render_members() -> str:
    """Each name of either trainer, but those that begin with an underscore."""
    every = {**SFT_MEMBERS, **GRPO_MEMBERS}
    rows = ["| TRL | here | |", "|---|---|---|"]
    for kind, says in _MEMBERS.items():
        by_reason: dict[str, list[str]] = {}
        for name, member in every.items():
            if member.kind == kind and not name.startswith("_"):
                by_reason.setdefault(member.why, []).append(f"`{name}`")
        rows += [f"| {', '.join(names)} | {says} | {why} |" for why, names in by_reason.items()]
    return "\n".join(rows) + "\n"


def _table(settings: Mapping[str, Setting]) -> str:
    ordered = sorted(settings.items(), key=lambda entry: _ORDER.index(entry[1].kind))
    rows = ["| TRL | here | |", "|---|---|---|"]
    for (kind, becomes), entries in groupby(ordered, key=lambda entry: (entry[1].kind, entry[1].becomes)):
        found = list(entries)
        names = ", ".join(f"`{name}`" for name, _ in found)
        rows.append(
            f"| {names} | {_SAYS[kind]}{_values(found[0][1], kind, alone=len(found) == 1)} | {_marked(becomes)} |"
        )
    return "\n".join(rows) + "\n"


def _values(setting: Setting, kind: str, *, alone: bool) -> str:
    if kind != "refused":
        return ""
    if not alone:
        return " TRL's defaults"
    values = dict.fromkeys(literal(value) for value in (setting.default, *setting.fine))
    return " " + ", ".join(f"`{value}`" for value in values)


def _marked(text: str) -> str:
    return _SETTING.sub(lambda match: f"`{match[0]}`", text).replace("|", "\\|")


if __name__ == "__main__":
    sys.stdout.write(render_tables() + "\n" + render_members())
