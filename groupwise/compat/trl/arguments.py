"""GRPOConfig and SFTConfig: TRL's arguments as attributes, checked where they are given."""

from __future__ import annotations

import difflib
import json
import logging
from collections.abc import Mapping
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar

from groupwise.compat.trl.settings import GRPO, SFT, Setting
from groupwise.config.values import literal
from groupwise.errors import ConfigError

logger = logging.getLogger(__name__)


class Arguments:
    """Every argument of the table is an attribute, with TRL's default where it was not given.

    Attributes:
        given: names that the program gave.

    Raises:
        ConfigError: a name that TRL does not have either, a value of the wrong kind, or one that cannot act here; on
            assignment too.
    """

    SETTINGS: ClassVar[Mapping[str, Setting]]

    def __init__(self, output_dir: str | None = None, **arguments: Any) -> None:
        vars(self).update({name: setting.default for name, setting in self.SETTINGS.items()}, given=set[str]())
        for name, value in {"output_dir": output_dir, **arguments}.items():
            setattr(self, name, value)
        hints = [self._hint(name) for name in sorted(self.given) if self.SETTINGS[name].kind == "hint"]
        for hint in filter(None, hints):
            logger.warning(hint)

    def __setattr__(self, name: str, value: Any) -> None:
        setting = self.SETTINGS.get(name)
        if setting is None:
            near = difflib.get_close_matches(name, self.SETTINGS, n=1, cutoff=0.6)
            hint = f"did you mean {near[0]}?" if near else "docs/migrate.md lists all"
            raise ConfigError(f"{type(self).__name__} has no argument {name!r}; {hint}")
        value = value.value if isinstance(value, Enum) else value
        if setting.kind == "refused" and not setting.says_nothing(value):
            raise ConfigError(f"{self._place(name)} = {literal(value)} is refused: {setting.becomes}")
        if not _fits(setting.default, value):
            expected = {bool: "True or False", str: "text"}.get(type(setting.default), "a number")
            raise ConfigError(f"{self._place(name)} = {literal(value)}: expected {expected}")
        vars(self)[name] = setting.default if value is None and None not in setting.fine else value
        if value is None:
            self.given.discard(name)
        else:
            self.given.add(name)

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    def __repr__(self) -> str:
        given = ", ".join(f"{name}={vars(self)[name]!r}" for name in self.SETTINGS if name in self.given)
        return f"{type(self).__name__}({given})"

    # What callbacks read of TrainingArguments beside arguments: one process on one device.
    world_size = 1
    process_index = 0
    local_process_index = 0
    should_log = True
    should_save = True

    def to_dict(self) -> dict[str, Any]:
        """All arguments by name."""
        return {name: vars(self)[name] for name in self.SETTINGS}

    def to_json_string(self) -> str:
        """As `to_dict`; what JSON cannot hold is text."""
        return json.dumps(self.to_dict(), indent=2, default=str)

    def _place(self, name: str) -> str:
        return f"{type(self).__name__}.{name}"

    def _hint(self, name: str) -> str:
        value = vars(self)[name]
        return (
            ""
            if self.SETTINGS[name].says_nothing(value)
            else (f"{self._place(name)} = {literal(value)} changes nothing here: {self.SETTINGS[name].becomes}")
        )


def _fits(default: Any, value: Any) -> bool:
    """Whether a value is of the kind of a default; None and defaults of None admit anything."""
    if value is None or default is None or isinstance(default, tuple | list | dict):
        return True
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(value, bool) or (isinstance(default, str) and default in ("no", "group"))
    if isinstance(default, int | float):
        return isinstance(value, int | float)
    return isinstance(value, str) or not isinstance(value, int | float)


class GRPOConfig(Arguments):
    """TRL's GRPOConfig, the arguments that its newer versions dropped included. See docs/migrate.md.

    Example:
        GRPOConfig("outputs", learning_rate=5e-6, num_generations=8, max_completion_length=512, max_steps=100)
    """

    SETTINGS = GRPO


class SFTConfig(Arguments):
    """TRL's SFTConfig. See docs/migrate.md.

    Example:
        SFTConfig("outputs", dataset_text_field="text", per_device_train_batch_size=8, num_train_epochs=2)
    """

    SETTINGS = SFT
