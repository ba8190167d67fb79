"""How a class of XTuner's names says what each of its fields becomes here.

Every field carries one mark, or holds other such objects: so no field can be accepted and forgotten.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeAlias

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

from groupwise.config.problems import shortened
from groupwise.errors import ConfigError, nearest


@dataclass(frozen=True, slots=True)
class Becomes:
    """The setting that a field becomes.

    Attributes:
        via: from the field's value to the setting's; raises `ValueError` for a value that has no equal here.

    Example:
        lr: Annotated[float, Becomes("optim.lr")] = 1e-5
    """

    setting: str
    via: Callable[[Any], Any] | None = None


@dataclass(frozen=True, slots=True)
class Inert:
    """A field that changes no result and needs no equal here; another value than the default is answered in a line."""

    because: str


@dataclass(frozen=True, slots=True)
class Only:
    """A field that can have its default alone."""

    because: str


@dataclass(frozen=True, slots=True)
class Apart:
    """A field that `translate` reads together with others."""

    becomes: str


Mark: TypeAlias = Becomes | Inert | Only | Apart


class Names(BaseModel):
    """A configuration class of XTuner's: unknown names and wrong values are refused as soon as they are given."""

    model_config = ConfigDict(
        extra="forbid", validate_assignment=True, arbitrary_types_allowed=True, protected_namespaces=()
    )

    OVERRIDABLE: ClassVar[frozenset[str]] = frozenset()
    """Methods that a program's subclass may have, because the program itself, or `groupwise xtuner`, calls them."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if cls.__module__.startswith("groupwise."):
            return
        for name, value in vars(cls).items():
            inner = name.startswith(("_", "build")) or any(name in vars(kind) for kind in cls.__mro__[1:])
            if callable(value) and inner and not name.startswith("__") and name not in cls.OVERRIDABLE:
                raise ConfigError(
                    f"{cls.__name__} overrides {name}, which nobody would call here: a program says what it wants by "
                    "the fields of docs/migrate.md, and rewards are JudgerConfig(reward_handler=your_function)"
                )

    def __init__(self, **given: Any) -> None:
        try:
            super().__init__(**given)
        except ValidationError as error:
            raise ConfigError(_in_words(type(self), error)) from None

    def __setattr__(self, name: str, value: Any) -> None:
        try:
            super().__setattr__(name, value)
        except ValidationError as error:
            raise ConfigError(_in_words(type(self), error)) from None

    @classmethod
    def marks(cls) -> dict[str, Mark | None]:
        """Each field's mark; None where it holds other objects."""
        return {
            name: next((one for one in info.metadata if isinstance(one, Mark)), None)
            for name, info in cls.model_fields.items()
        }


def _default(info: FieldInfo) -> Any:
    return info.get_default(call_default_factory=True, validated_data={})


def _in_words(owner: type[Names], error: ValidationError) -> str:
    lines = []
    for detail in error.errors():
        name = ".".join(str(part) for part in detail["loc"])
        place = f"{owner.__name__}.{name}" if name else owner.__name__
        if detail["type"] in ("extra_forbidden", "no_such_attribute"):
            names = ", ".join(owner.model_fields) or "none at all"
            hint = nearest(name, owner.model_fields, "did you mean {!r}?") or f"known here: {names}"
            lines.append(f"{place}: there is no such argument; {hint}")
        elif detail["type"] == "missing":
            lines.append(f"{place}: it has no default; give it a value")
        elif detail["type"] == "value_error":
            lines.append(f"{place}: {detail['msg'].removeprefix('Value error, ')}")
        else:
            expected = detail["msg"].removeprefix("Input should be ")
            lines.append(f"{place}: got {detail['input']!r}; expected {expected}")
    return "\n".join(lines)


@dataclass(slots=True)
class Translation:
    """Settings gathered from a program's objects.

    Attributes:
        values: by dotted name.
        origins: dotted name -> the field that gave it.
        inert: why fields have no effect here -> those that were given.
        problems: one line for each field that is refused.
    """

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    inert: dict[str, list[str]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    _given: set[str] = field(default_factory=set)

    def take(self, names: Names, place: str = "") -> None:
        """All marked fields of `names`, and of the objects inside; `place` is where it is in the program."""
        marks = names.marks()
        for name, value in names:
            mark, where = marks[name], f"{place}.{name}" if place else name
            info = type(names).model_fields[name]
            if mark is None:
                self._take_inside(value, where)
            elif isinstance(mark, Becomes):
                self._become(mark, value, where, given=name in names.model_fields_set)
            elif not isinstance(mark, Apart) and value != info.get_default(
                call_default_factory=True, validated_data={}
            ):
                self._without_effect(mark, f"{where} = {shortened(value)}" if info.repr else where)

    def was_given(self, setting: str) -> bool:
        """Whether the program itself said it, and not a default."""
        return setting in self._given

    def put(self, setting: str, value: Any, where: str, *, given: bool = True) -> None:
        """One setting; what was given beats a default, and two that were given must agree. None says nothing."""
        if value is None:
            return
        present = self.values.get(setting)
        if present is not None and present != value and given and setting in self._given:
            self.problems.append(
                f"{where} = {shortened(value)} and {self.origins[setting]} = {shortened(present)} are both {setting} "
                "here; give them the same value"
            )
        elif present is None or (given and setting not in self._given):
            self.values[setting], self.origins[setting] = value, where
            self._given |= {setting} if given else set()

    @property
    def notes(self) -> list[str]:
        """One line for each reason."""
        return [f"{', '.join(fields)}: {because}" for because, fields in self.inert.items()]

    def note(self, field: str, because: str) -> None:
        self.inert.setdefault(because, []).append(field)

    def _without_effect(self, mark: Inert | Only, field: str) -> None:
        if isinstance(mark, Inert):
            self.note(field, mark.because)
        else:
            self.problems.append(f"{field}: {mark.because}")

    def _take_inside(self, value: Any, place: str) -> None:
        if isinstance(value, Names):
            self.take(value, place)
        elif isinstance(value, list) and value:
            self.take(value[0], f"{place}[0]")
            if len(value) > 1:
                self.problems.append(f"{place}: got {len(value)} entries; expected one: put all rows into one file")

    def _become(self, mark: Becomes, value: Any, where: str, *, given: bool) -> None:
        try:
            self.put(mark.setting, mark.via(value) if mark.via else value, where, given=given)
        except ValueError as error:
            self.problems.append(f"{where} = {shortened(value)}: {error}")
