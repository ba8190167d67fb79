"""What all sections share: frozen after load, unknown keys refused; and sections that a key chooses among."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, get_args

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

REFUSED = "refused"
"""The type of the error that `refusal` makes."""


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


class Variant(Section):
    """One of several sections that may stand in one place; all have one direct base, under this class.

    Attributes:
        chosen_by: the key inside that says which.
        choice: the value of that key, or the values in words; of a literal it need not be given.

    Example:
        class Loss(Variant): ...
        class Gspo(Loss): name: Literal["gspo"] = "gspo"
        Gspo.choice     # "gspo"
    """

    chosen_by: ClassVar[str] = "name"
    choice: ClassVar[str]

    @classmethod
    def __pydantic_init_subclass__(cls, **options: Any) -> None:
        super().__pydantic_init_subclass__(**options)
        if "choice" not in vars(cls) and cls.chosen_by in cls.model_fields:
            cls.choice = str(get_args(cls.model_fields[cls.chosen_by].annotation)[0])

    @classmethod
    def alternatives(cls) -> list[type[Variant]]:
        """All that may stand in this one's place, itself among them."""
        base = next(kind for kind in cls.__mro__ if Variant in kind.__bases__)
        return base.__subclasses__()

    @model_validator(mode="before")
    @classmethod
    def _refuse_settings_of_others(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        # None says nothing: a resolved config of another variant holds it for what is off.
        given = {key: value for key, value in given.items() if value is not None or key in cls.model_fields}
        for key in given:
            users = [one.choice for one in cls.alternatives() if key in one.model_fields]
            if users and key not in cls.model_fields:
                raise refusal(
                    key,
                    f"got {given[key]!r}, which has no effect with {cls.chosen_by} = {cls.choice}; remove it, or set "
                    f"{cls.chosen_by} to {listed(users)}",
                )
        return given


def refusal(key: str, text: str) -> PydanticCustomError:
    """What a section's validator raises about one of its keys: the message then has that key's name and origin."""
    return PydanticCustomError(REFUSED, "{key}: {text}", {"key": key, "text": text})


def listed(names: Sequence[str]) -> str:
    """`a, b or c`."""
    return " or ".join(part for part in (", ".join(names[:-1]), names[-1]) if part)


def switched(off: type[Variant], on: type[Variant], *off_values: str) -> Callable[[Any], str]:
    """For a `Discriminator`: `off` while the key that chooses is not given, none, or one of `off_values`."""

    def choose(given: Any) -> str:
        if isinstance(given, Variant):
            return given.choice
        value = given.get(off.chosen_by) if isinstance(given, Mapping) else None
        return off.choice if str(value).strip().lower() in ("none", *off_values) else on.choice

    return choose
