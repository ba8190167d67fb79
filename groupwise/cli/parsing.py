"""From arguments to a namespace and dotted overrides, with the nearest valid name in every refusal."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from groupwise.errors import ConfigError, nearest

DOTTED = re.compile(r"--(?P<key>[A-Za-z_]\w*(?:\.\w+)+)(?:=(?P<value>.*))?", re.DOTALL)
NUMBER = re.compile(r"-\.?\d")
DID_YOU_MEAN = "; did you mean `{}`?"


class Parser(argparse.ArgumentParser):
    """Raises `ConfigError` where argparse would print its usage and exit; knows its flags, to suggest the nearest."""

    def __init__(self, name: str, *, description: str) -> None:
        super().__init__(
            prog=f"groupwise {name}".strip(),
            description=description,
            allow_abbrev=False,
            add_help=False,
            formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=36, width=110),
        )
        self.flags: list[str] = []
        self.add_argument("-h", "--help", action="help", help="show this and exit")
        self.add_argument("--debug", action="store_true", help="show the traceback of an error")

    def add_argument(self, *name_or_flags: str, **kwargs: Any) -> argparse.Action:
        action = super().add_argument(*name_or_flags, **kwargs)
        self.flags += action.option_strings
        return action

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see `{self.prog} --help`")


@dataclass(frozen=True, slots=True)
class Command:
    """One command of `groupwise`.

    Attributes:
        name: one or two words.
        settings: dotted keys, or sections ending in a dot, that the command accepts as `--section.key value`.
        idle: of these sections, the keys that would not act.

    Example:
        Command(name="model tiny", summary="make a tiny model", add_arguments=add_arguments, run=run)
    """

    name: str
    summary: str
    add_arguments: Callable[[Parser], None]
    run: Callable[[argparse.Namespace], None]
    settings: tuple[str, ...] = ()
    idle: tuple[str, ...] = ()
    epilog: str | None = None

    def parser(self) -> Parser:
        parser = Parser(self.name, description=self.summary)
        parser.epilog = self.epilog
        self.add_arguments(parser)
        return parser

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        """The namespace, with the dotted settings in `overrides` as `--key=value`."""
        parser = self.parser()
        rest, overrides = split_overrides(arguments) if self.settings else (list(arguments), [])
        _check_flags(rest, parser, settings=self.settings)
        for override in overrides:
            _check_acts(override, self)
        return parser.parse_args(rest, argparse.Namespace(overrides=overrides))


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Take `--section.key value` and `--section.key=value` out of the arguments: (the rest, `--section.key=value` …).

    This precedes argparse, which would take the value of a flag it does not know for a positional argument. A key
    without a value stays without: it may be a switch, which the loader of the config knows.
    """
    rest: list[str] = []
    overrides: list[str] = []
    position = 0
    while position < len(arguments):
        argument = arguments[position]
        position += 1
        match = DOTTED.fullmatch(argument)
        if match is None:
            rest.append(argument)
        elif match["value"] is None and position < len(arguments) and not arguments[position].startswith("--"):
            overrides.append(f"{argument}={arguments[position]}")
            position += 1
        else:
            overrides.append(argument)
    return rest, overrides


def set_key(key: str, value: object) -> list[str]:
    """The override for a flag that stands for a setting; none when the flag was not given."""
    return [] if value is None else [f"--{key}={value}"]


def set_rewards(names: Sequence[str] | None) -> list[str]:
    """The override for `--reward A --reward B`, which replaces the rewards that a file has."""
    return [] if not names else [f"--reward={json.dumps([{'name': name} for name in names])}"]


def _check_flags(arguments: Sequence[str], parser: Parser, *, settings: Sequence[str]) -> None:
    """Refuse unknown flags before argparse complains of what they left unset."""
    for argument in arguments:
        if argument == "--":
            return
        if not argument.startswith("-") or argument == "-" or " " in argument or NUMBER.match(argument):
            continue
        flag = argument.partition("=")[0]
        if flag in parser.flags or (not flag.startswith("--") and flag[:2] in parser.flags):
            continue
        hint = _nearest_flag(flag, parser.flags, settings=settings) or f"; see `{parser.prog} --help`"
        raise ConfigError(f"`{parser.prog}` has no flag {flag}{hint}")


def _nearest_flag(flag: str, flags: Sequence[str], *, settings: Sequence[str]) -> str:
    # Without their dashes, which would make every short flag look like every other.
    near = nearest(flag.lstrip("-"), [known[2:] for known in flags if known.startswith("--")], "; did you mean `--{}`?")
    if near or not settings:
        return near
    from groupwise.config.keys import nearest_key

    hint = nearest_key(flag.lstrip("-").replace("-", "_"))
    return "; " + hint.replace(" `", " `--") if hint.startswith("did you mean") else ""


def _check_acts(override: str, command: Command) -> None:
    """Refuse a setting that exists but that this command would ignore."""
    key = override[2:].partition("=")[0]
    if key not in command.idle and any(
        key == name or (name.endswith(".") and key.startswith(name)) for name in command.settings
    ):
        return
    from groupwise.config.keys import annotation_of, nearest_key

    if annotation_of(key) is None:
        raise ConfigError(f"unknown setting --{key}: {nearest_key(key)}")
    acting = ", ".join(f"{name}*" if name.endswith(".") else name for name in command.settings)
    acting += f" without {', '.join(command.idle)}" if command.idle else ""
    raise ConfigError(f"--{key} has no effect in `groupwise {command.name}`; the settings that act here: {acting}")


def whole_number(minimum: int) -> Callable[[str], int]:
    """An argparse type: a whole number of at least `minimum`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or value < minimum:
            raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number of at least {minimum}")
        return value

    return parse
