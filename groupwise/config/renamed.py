"""Names of settings in earlier versions: they still act, and are told what they are today."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from groupwise.config.base import Section
from groupwise.errors import ConfigError

logger = logging.getLogger(__name__)

RENAMED: Mapping[str, str] = {
    "algorithm.advantage": "algorithm.advantage.name",
    "algorithm.loss": "algorithm.loss.name",
    "algorithm.correction": "algorithm.correction.name",
    "algorithm.scale": "algorithm.advantage.scale",
    "algorithm.pass_k": "algorithm.advantage.k",
    "algorithm.pass_k_threshold": "algorithm.advantage.threshold",
    "algorithm.clip_low": "algorithm.loss.clip_low",
    "algorithm.clip_high": "algorithm.loss.clip_high",
    "algorithm.dual_clip": "algorithm.loss.dual_clip",
    "algorithm.sapo_temperature_positive": "algorithm.loss.temperature_positive",
    "algorithm.sapo_temperature_negative": "algorithm.loss.temperature_negative",
    "algorithm.kl_coef": "algorithm.kl.coef",
    "algorithm.kl_in": "algorithm.kl.place",
    "algorithm.kl_estimator": "algorithm.kl.estimator",
    "algorithm.reference_sync_every": "algorithm.reference.sync_every",
    "algorithm.reference_mixup": "algorithm.reference.mixup",
    "algorithm.entropy_coef": "algorithm.entropy.coef",
    "algorithm.entropy_target": "algorithm.entropy.target",
    "algorithm.entropy_coef_step": "algorithm.entropy.coef_step",
    "algorithm.entropy_coef_min": "algorithm.entropy.coef_min",
    "algorithm.entropy_coef_max": "algorithm.entropy.coef_max",
    "algorithm.top_entropy_fraction": "algorithm.entropy.top_fraction",
    "algorithm.correction_level": "algorithm.correction.level",
    "algorithm.correction_low": "algorithm.correction.low",
    "algorithm.correction_high": "algorithm.correction.high",
    "algorithm.correction_veto": "algorithm.correction.veto",
    "algorithm.off_policy_mask": "algorithm.correction.off_policy_mask",
    "rollout.url": "rollout.urls",
}
"""The name in an earlier version -> the name today. The first three are tables today, and hold other keys."""

_NEVER_NONE = {
    *("algorithm.advantage", "algorithm.loss", "algorithm.correction", "algorithm.kl_coef", "algorithm.kl_in"),
    *("algorithm.reference_sync_every", "algorithm.entropy_coef", "algorithm.top_entropy_fraction"),
}
"""Of the others, none said that nothing was given: a resolved config held it for every key that did not act."""


@dataclass(frozen=True, slots=True)
class Renaming:
    """Tables of a config, in the names of today.

    Attributes:
        named: the earlier names that were met, with those of today.
        clashes: the earlier names whose setting was given by its name of today, too.

    Example:
        of_today({"algorithm": {"kl_coef": 0.1}}).values == {"algorithm": {"kl": {"coef": 0.1}}}
    """

    values: dict[str, Any]
    named: dict[str, str]
    clashes: list[str]

    @property
    def remark(self) -> str:
        """What to tell a person."""
        changes = ", ".join(f"{old} is now {new}" for old, new in self.named.items())
        return f"{changes}; {'the earlier names still act' if len(self.named) > 1 else 'the earlier name still acts'}"


def name_of_today(dotted: str, value: Any = "") -> str:
    """`algorithm.kl_coef` is `algorithm.kl.coef`; `algorithm.loss` is `algorithm.loss.name`, unless it is a table."""
    is_table = value.lstrip().startswith("{") if isinstance(value, str) else _is_table(value)
    return dotted if is_table else RENAMED.get(dotted, dotted)


def dotted_of_today(given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Settings by dotted names, in the names of today; a warning has those that were not.

    Args:
        where: they were given, for messages.

    Raises:
        ConfigError: one is given by both names.
    """
    named = {old: new for old in given if (new := name_of_today(old, given[old])) != old}
    if twice := [f"{where}: {old}: {clash(old)}" for old, new in named.items() if new in given]:
        raise ConfigError("\n".join(twice))
    if named:
        logger.warning("%s: %s", where, Renaming({}, named, []).remark)
    return {named.get(dotted, dotted): value for dotted, value in given.items()}


def of_today(values: Mapping[str, Any]) -> Renaming:
    """The tables of a config, of whatever version; these are not changed themselves."""
    found = Renaming({name: _copied(table) for name, table in values.items()}, {}, [])
    for old, new in RENAMED.items():
        section, _, key = old.partition(".")
        table = found.values.get(section)
        if not isinstance(table, dict) or key not in table or _is_table(table[key]):
            continue
        value = table.pop(key)
        if value is None and old not in _NEVER_NONE:
            continue
        found.named[old] = new
        *parts, inside = new.split(".")[1:]
        node: Any = table
        for part in parts:
            node[part] = _copied(node.get(part, {}))
            node = node[part]
        if not isinstance(node, dict) or inside in node:
            found.clashes.append(old)
        else:
            node[inside] = value
    return found


def clash(old: str) -> str:
    """The sentence for a setting that was given by two names."""
    return f"it is {RENAMED[old]} today, and that is given too; keep {RENAMED[old]} alone"


def _is_table(value: Any) -> bool:
    return isinstance(value, Mapping | Section)


def _copied(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else value
