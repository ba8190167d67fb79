"""What a program overrides, sets and reads of a trainer acts, or is refused at that moment with a reason.

A boundary: names of TRL's trainers are looked up in the table of `surface`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from groupwise.compat.trl.surface import Member
from groupwise.errors import ConfigError, nearest

_OURS = "groupwise."
_TAKEN_FOR_A_SLIP = 0.8  # a program may keep values of its own on a trainer, under names that are less alike


class GuardedType(type):
    """The class of trainers' classes: what is set on a class is checked like what a subclass defines."""

    def __setattr__(cls, name: str, value: Any) -> None:
        if not name.startswith("_abc_") and not name.startswith("__") and cls.MEMBERS:  # pyright: ignore[reportAttributeAccessIssue]
            _check_override(cls, name, of=cls)
        super().__setattr__(name, value)


class Guarded(metaclass=GuardedType):
    """A trainer with the names of `MEMBERS`.

    Raises:
        ConfigError: a subclass overrides, or a program sets, what cannot act.
        AttributeError: a name that is read is not there; says why, or which is the nearest.
    """

    MEMBERS: ClassVar[Mapping[str, Member]] = {}
    ASSIGNABLE: ClassVar[frozenset[str]] = frozenset()

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if cls.__module__.startswith(_OURS):
            return
        for kind in cls.__mro__:
            if issubclass(kind, Guarded) and kind.__module__.startswith(_OURS):
                break
            for name in vars(kind):
                if kind is not object and not name.startswith("__"):
                    _check_override(cls, name, of=kind)

    def __setattr__(self, name: str, value: Any) -> None:
        if vars(self).get("_complete"):
            self._check_assignment(name)
            if name in self.ASSIGNABLE:
                self._assigned(name, value)
                return
        elif (member := self.MEMBERS.get(name)) and member.kind not in ("hook", "here"):
            raise ConfigError(_refusal(type(self), name, member))
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        member = self.MEMBERS.get(name)
        place = type(self).__name__
        if member is None:
            if name.startswith("__"):
                raise AttributeError(name)
            known = [*self.MEMBERS, *dir(type(self))]
            hint = nearest(name, known, "did you mean {!r}?") or "docs/migrate.md lists what there is"
            raise AttributeError(f"{place} has no attribute {name!r}; {hint}")
        if member.kind == "constant":
            return member.value
        if member.kind == "argument" and "args" in vars(self):
            return vars(vars(self)["args"]).get(member.value)
        why = member.why if member.kind == "refused" else "it is there when the trainer is made"
        raise AttributeError(f"{place}.{name}: {why}")

    def _set(self, **values: Any) -> None:
        """The trainer's own changes of itself."""
        vars(self).update(values)

    def _assigned(self, name: str, value: Any) -> None:
        raise NotImplementedError

    def _check_assignment(self, name: str) -> None:
        member = self.MEMBERS.get(name)
        if name in self.ASSIGNABLE or (member is not None and member.kind == "hook"):
            return
        if member is not None or _is_ours(type(self), name):
            raise ConfigError(_refusal(type(self), name, member))
        if name in vars(self):
            return
        public = [known for known in self.MEMBERS if not known.startswith("_")]
        if near := nearest(name, public, cutoff=_TAKEN_FOR_A_SLIP):
            raise ConfigError(f"{type(self).__name__} has no attribute {name!r}; did you mean {near!r}?")


def _check_override(cls: type, name: str, *, of: type) -> None:
    """Raises ConfigError where `of`, the class or one that it mixes in, defines what nobody would call."""
    members: Mapping[str, Member] = cls.MEMBERS  # pyright: ignore[reportAttributeAccessIssue]
    member = members.get(name)
    place = cls.__name__ if of is cls else f"{cls.__name__} (in {of.__name__})"
    if member is not None and member.kind != "hook":
        raise ConfigError(f"{place} overrides {name}, which nobody would call here: {member.why or _RATHER}")
    if member is None and _is_ours(cls, name):
        raise ConfigError(f"{place} defines {name}, a name that the trainer uses itself; take another one")


def _is_ours(cls: type, name: str) -> bool:
    """Whether the trainer itself has a method or keeps something under that name."""
    ours = [kind for kind in cls.__mro__ if kind.__module__.startswith(_OURS)]
    return any(name in vars(kind) or name in kind.__annotations__ for kind in ours)


_RATHER = "give it to the trainer"


def _refusal(cls: type, name: str, member: Member | None) -> str:
    why = "the trainer uses that name itself; take another one" if member is None else member.why
    return f"{cls.__name__}.{name} cannot be set: {why}"
