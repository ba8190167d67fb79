"""GRPOConfig and SFTConfig: TRL's arguments as attributes, checked where they are given."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from enum import Enum
from typing import Any, ClassVar, Protocol
from weakref import WeakSet

import torch

from groupwise.compat.trl.settings import GRPO, SFT, Setting
from groupwise.config.values import literal
from groupwise.errors import ConfigError, nearest
from groupwise.model.loading import resolve_device

logger = logging.getLogger(__name__)


class ArgumentsUser(Protocol):
    """A trainer that reads its arguments again whenever it begins something."""

    def args_change(self, name: str) -> None:
        """Raises ConfigError where it is too late for that."""
        ...


class Arguments:
    """Every argument of the table is an attribute, with TRL's default where it was not given.

    Attributes:
        given: names that the program gave.

    Raises:
        ConfigError: a name that TRL does not have either, a value of the wrong kind, or one that cannot act here; on
            assignment too.
    """

    SETTINGS: ClassVar[Mapping[str, Setting]]
    OWN: ClassVar[Mapping[str, Any]] = {}
    """Fields of a program's subclass with their defaults: arguments, and its own, which nothing here reads."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if cls.__module__.startswith("groupwise."):
            return
        for name in vars(cls):
            if name == "__post_init__" or (not name.startswith("__") and hasattr(Arguments, name)):
                raise ConfigError(
                    f"{cls.__name__} overrides {name}, which nobody would call here; set arguments where it is made"
                )
        names = dict.fromkeys([*cls.__annotations__, *(name for name in vars(cls) if name in cls.SETTINGS)])
        cls.OWN = {**cls.OWN, **{name: vars(cls).get(name) for name in names}}
        if "__init__" not in vars(cls):
            cls.__init__ = Arguments.__init__  # which a dataclass's decorator leaves alone
            cls.__repr__ = Arguments.__repr__

    def __init__(self, output_dir: str | None = None, **arguments: Any) -> None:
        vars(self).update(
            {name: setting.default for name, setting in self.SETTINGS.items()}, given=set[str](), _users=WeakSet()
        )
        own = {name: _default_of(value) for name, value in self.OWN.items()}
        for name, value in {**own, "output_dir": output_dir or own.get("output_dir"), **arguments}.items():
            setattr(self, name, value)
        for name in sorted(self.given):
            self._say_hint(name)
        vars(self)["_made"] = True

    def __setattr__(self, name: str, value: Any) -> None:
        setting = self.SETTINGS.get(name)
        if setting is None and name in self.OWN:
            vars(self)[name] = value
            return
        if setting is None:
            hint = nearest(name, self.SETTINGS, "did you mean {}?") or "docs/migrate.md lists all"
            raise ConfigError(f"{type(self).__name__} has no argument {name!r}; {hint}")
        value = value.value if isinstance(value, Enum) else value
        if setting.kind == "refused" and not setting.says_nothing(value):
            raise ConfigError(f"{self._place(name)} = {literal(value)} is refused: {setting.becomes}")
        if not _fits(setting.default, value):
            expected = {bool: "True or False", str: "text"}.get(type(setting.default), "a number")
            raise ConfigError(f"{self._place(name)} = {literal(value)}: expected {expected}")
        for user in tuple(vars(self)["_users"]):
            user.args_change(name)
        vars(self)[name] = setting.default if value is None and None not in setting.fine else value
        if value is None:
            self.given.discard(name)
        else:
            self.given.add(name)
            if vars(self).get("_made"):
                self._say_hint(name)

    def __getattr__(self, name: str) -> Any:
        hint = "" if name.startswith("__") else nearest(name, self.SETTINGS, "; did you mean {}?")
        raise AttributeError(f"{type(self).__name__} has no argument {name!r}{hint}")

    def __repr__(self) -> str:
        shown = self.to_dict()
        given = ", ".join(f"{name}={shown[name]!r}" for name in self.SETTINGS if name in self.given)
        return f"{type(self).__name__}({given})"

    # What programs and callbacks read of TrainingArguments beside arguments: one process on one device.
    world_size = 1
    process_index = 0
    local_process_index = 0
    should_log = True
    should_save = True
    place_model_on_device = True

    @property
    def n_gpu(self) -> int:
        return 1 if self.device.type == "cuda" else 0

    @property
    def device(self) -> torch.device:
        return resolve_device("cpu" if self.use_cpu or self.no_cuda else "auto")

    @property
    def train_batch_size(self) -> int:
        return self.per_device_train_batch_size

    @property
    def eval_batch_size(self) -> int:
        return self.per_device_eval_batch_size

    def get_process_log_level(self) -> int:
        """That of the logger `groupwise`."""
        return logging.getLogger("groupwise").getEffectiveLevel()

    def main_process_first(self, local: bool = True, desc: str = "work") -> AbstractContextManager[None]:
        """There is one process."""
        return nullcontext()

    def to_sanitized_dict(self) -> dict[str, Any]:
        """As `to_dict`; what no tracker takes is text."""
        plain = (bool, int, float, str)
        return {name: value if isinstance(value, plain) else str(value) for name, value in self.to_dict().items()}

    def to_dict(self) -> dict[str, Any]:
        """All arguments by name; tokens are masked, as in transformers."""
        masked = {name: f"<{name.upper()}>" for name in self.given if name.endswith("_token")}
        return {name: vars(self)[name] for name in dict.fromkeys((*self.SETTINGS, *self.OWN))} | masked

    def to_json_string(self) -> str:
        """As `to_dict`; what JSON cannot hold is text."""
        return json.dumps(self.to_dict(), indent=2, default=str)

    def used_by(self, user: ArgumentsUser) -> None:
        """From now on `user` is asked before an argument changes."""
        vars(self)["_users"].add(user)

    def no_longer_used_by(self, user: ArgumentsUser) -> None:
        vars(self)["_users"].discard(user)

    def __getstate__(self) -> dict[str, Any]:
        """A copy has no users."""
        return {name: value for name, value in vars(self).items() if name != "_users"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update({**state, "given": set(state["given"]), "_users": WeakSet()})

    def _place(self, name: str) -> str:
        return f"{type(self).__name__}.{name}"

    def _say_hint(self, name: str) -> None:
        setting, value = self.SETTINGS[name], vars(self)[name]
        if setting.kind == "hint" and not setting.says_nothing(value):
            logger.warning("%s = %s changes nothing here: %s", *(self._place(name), literal(value), setting.becomes))


def _default_of(value: Any) -> Any:
    """Of a dataclass's `field(…)`, what it stands for."""
    if not isinstance(value, dataclasses.Field):
        return copy.copy(value)
    if value.default_factory is not dataclasses.MISSING:
        return value.default_factory()
    return None if value.default is dataclasses.MISSING else value.default


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
