"""Recipe files and command-line overrides in; one frozen `Config` out, with where each value came from.

Later wins: defaults, then each file in turn, then the command line. Whatever is wrong is reported at once, in one
`ConfigError`.

Example:
    loaded = load_config("recipes/gsm8k.toml", ["--optim.lr", "1e-6", "--reward.0.weight=2"])
    loaded.config.optim.lr      # 1e-06
    loaded.origins["optim.lr"]  # "command line"
"""

from __future__ import annotations

import copy
import json
import logging
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from groupwise.config import AlgorithmConfig, Config
from groupwise.config.base import Section
from groupwise.config.keys import annotation_of, describe_keys, nearest_key, sections_of
from groupwise.config.problems import Problem, problems_of, shortened
from groupwise.config.renamed import RENAMED, clash, dotted_of_today, of_today
from groupwise.config.secrets import is_redacted, public_values
from groupwise.config.values import literal, parse_value
from groupwise.errors import ConfigError, nearest

COMMAND_LINE = "command line"
DEFAULT = "default"
logger = logging.getLogger(__name__)

__all__ = ["LoadedConfig", "config_json", "describe_keys", "load_config", "parse_overrides", "render_resolved"]


@dataclass(frozen=True, slots=True)
class LoadedConfig:
    """A config and where each of its values came from.

    Attributes:
        origins: dotted name -> `default`, the file's path, or `command line`; every setting is there, in tree order.
    """

    config: Config
    origins: Mapping[str, str]


class _Tree:
    """The values as nested dicts and lists, and who set what."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.origins: dict[str, str] = {}
        self.problems: list[Problem] = []

    def add_file(self, path: Path) -> None:
        renaming = of_today(_read(path))
        self.problems += [Problem(old, str(path), clash(old)) for old in renaming.clashes]
        if renaming.named and path.suffix != ".json":  # nobody wrote a run's config.json
            logger.warning("%s: %s", path, renaming.remark)
        self._merge(self.values, renaming.values, "", str(path))

    def _merge(self, present: dict[str, Any], given: dict[str, Any], prefix: str, origin: str) -> None:
        """Lay `given` over what is there: key by key in sections, as a whole in anything else."""
        for key, value in given.items():
            dotted = prefix + key
            inside = present.get(key)
            if isinstance(inside, dict) and isinstance(value, dict) and sections_of(annotation_of(dotted)):
                self._merge(inside, value, f"{dotted}.", origin)
            else:
                present[key] = value
                self._record(dotted, value, origin)

    def add_overrides(self, given: Mapping[str, Any]) -> None:
        for dotted, value in dotted_of_today(given, COMMAND_LINE).items():
            self._set(dotted, value)

    def _set(self, dotted: str, value: Any) -> None:
        """One override; a text is parsed by the type of the setting that it is for."""
        annotation = annotation_of(dotted)
        if annotation is None:
            self.problems.append(Problem(dotted, COMMAND_LINE, f"there is no such setting; {nearest_key(dotted)}"))
            return
        try:
            if sections_of(annotation) and "." not in dotted:
                raise ValueError(f"it is a section; {nearest_key(f'{dotted}.*')}")
            parsed = parse_value(value, annotation) if isinstance(value, str) else copy.deepcopy(value)
            self._place(dotted.split("."), parsed)
        except ValueError as error:
            self.problems.append(Problem(dotted, COMMAND_LINE, f"got {shortened(value)}; {error}"))
            return
        self._record(dotted, parsed, COMMAND_LINE)

    def _record(self, dotted: str, value: Any, origin: str) -> None:
        for name in [name for name in self.origins if name == dotted or name.startswith(f"{dotted}.")]:
            del self.origins[name]
        self.origins.update(dict.fromkeys(_leaves(value, dotted), origin))

    def _place(self, parts: list[str], value: Any) -> None:
        node: Any = self.values
        for depth, part in enumerate(parts[:-1]):
            empty: Any = [] if parts[depth + 1].isdecimal() and depth == 0 else {}
            node = _child(node, part, empty)
        if isinstance(node, list):
            _child(node, parts[-1], value)
            node[int(parts[-1])] = value
        else:
            node[parts[-1]] = value

    def origin_of(self, dotted: str) -> str:
        """Who set the value, or the table that it is in, or parts of it."""
        inside = [origin for name, origin in self.origins.items() if name == dotted or name.startswith(f"{dotted}.")]
        if inside:
            return " + ".join(dict.fromkeys(inside))
        outside = [name for name in self.origins if dotted.startswith(f"{name}.")]
        return self.origins[max(outside, key=len)] if outside else DEFAULT


def _child(node: Any, part: str, empty: Any) -> Any:
    """The value under `part`, put there empty when it is missing; an index may be one past the end of a list."""
    if isinstance(node, list):
        if not part.isdecimal() or int(part) > len(node):
            raise ValueError(f"there are {len(node)} entries; expected a number from 0 to {len(node)}, not {part}")
        if int(part) == len(node):
            node.append(empty)
        return node[int(part)]
    if isinstance(node, dict):
        return node.setdefault(part, empty)
    raise ValueError("the setting that it is in is not a table")


def load_config(
    path: str | Path | Sequence[str | Path] | None = None, overrides: Sequence[str] | Mapping[str, Any] = ()
) -> LoadedConfig:
    """Read recipe files (TOML, or the `config.json` of a run), lay the overrides over them, and check every value.

    Args:
        path: one file, several (later ones win, key by key; a later `[[reward]]` list replaces the earlier one), or
            None for the defaults alone.
        overrides: words of the command line (`--optim.lr 1e-6`, `--optim.lr=1e-6`), or dotted names with values; there
            too a text is parsed by the setting's type.

    Raises:
        ConfigError: a file cannot be read, or a name or a value is wrong; it lists everything that is.
    """
    tree = _Tree()
    for file in _as_files(path):
        tree.add_file(file)
    given = overrides if isinstance(overrides, Mapping) else parse_overrides(overrides)
    tree.add_overrides(given)
    try:
        config = Config.model_validate(tree.values)
    except ValidationError as error:
        tree.problems.extend(problems_of(error, tree.values, tree.origin_of))
    else:
        tree.problems.extend(problems_of(None, tree.values, tree.origin_of))
        tree.problems.extend(
            Problem(
                name, tree.origin_of(name), 'a secret was here, which no file keeps; give it again, or as "env:NAME"'
            )
            for name, value in settings(config).items()
            if is_redacted(value)
        )
        if not tree.problems:
            return LoadedConfig(config, {name: tree.origin_of(name) for name in settings(config)})
    listing = "\n".join(f"  {problem}" for problem in tree.problems)
    raise ConfigError(f"the configuration has {len(tree.problems)} problem(s):\n{listing}")


def _as_files(path: str | Path | Sequence[str | Path] | None) -> list[Path]:
    if path is None:
        return []
    return [Path(path)] if isinstance(path, str | Path) else [Path(file) for file in path]


def parse_overrides(words: Sequence[str]) -> dict[str, str]:
    """`["--optim.lr", "1e-6", "--data.shuffle=false"]` as `{"optim.lr": "1e-6", "data.shuffle": "false"}`.

    A switch (`true or false`) may stand alone, and then means true. A value that begins with `--` needs the `=` form.

    Raises:
        ConfigError: a word is not an option, or an option has no value.
    """
    given: dict[str, str] = {}
    remaining = list(words)
    while remaining:
        word = remaining.pop(0)
        dotted, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not dotted:
            raise ConfigError(f"got `{word}` on the command line; expected `--section.key value`")
        if not equals:
            if remaining and not remaining[0].startswith("--"):
                value = remaining.pop(0)
            elif annotation_of(dotted) is bool:
                value = "true"
            else:
                hint = (
                    "" if annotation_of(dotted) is not None else f" (there is no such setting; {nearest_key(dotted)})"
                )
                raise ConfigError(f"got `{word}` without a value; expected `{word} VALUE` or `{word}=VALUE`{hint}")
        given[dotted] = value
    return given


def _read(path: Path) -> dict[str, Any]:
    """The tables of one file.

    Raises:
        ConfigError: it is missing, a folder, not UTF-8, or not TOML (or JSON, by its suffix).
    """
    if not path.is_file():
        raise ConfigError(f"{path}: {_why_no_file(path)}")
    try:
        text = path.read_bytes().decode("utf-8-sig")
        values = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: got bytes that are not UTF-8 ({error}); save the file as UTF-8") from None
    except (ValueError, RecursionError) as error:
        expected = "JSON" if path.suffix == ".json" else "TOML"
        raise ConfigError(f"{path}: got text that is not {expected}: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: got a JSON {type(values).__name__}; expected an object with the config's sections")
    return values


def _why_no_file(path: Path) -> str:
    if path.is_dir():
        return "got a folder; expected a recipe file (TOML) or a run's config.json"
    siblings = [file.name for file in path.parent.iterdir() if file.is_file()] if path.parent.is_dir() else []
    near = nearest(path.name, siblings)
    return "no such file" + (f"; did you mean {path.with_name(near)}?" if near else "; expected a recipe file (TOML)")


def _leaves(value: Any, dotted: str) -> list[str]:
    if isinstance(value, dict) and value:
        return [leaf for key, item in value.items() for leaf in _leaves(item, f"{dotted}.{key}")]
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        return [leaf for index, item in enumerate(value) for leaf in _leaves(item, f"{dotted}.{index}")]
    return [dotted]


def settings(config: Config) -> dict[str, Any]:
    """Every setting of this config by dotted name (`reward.0.weight`), in tree order; an empty list is one setting."""
    return dict(_settings_in(config, ""))


def _settings_in(value: Any, dotted: str) -> Iterator[tuple[str, Any]]:
    inside: Iterable[tuple[object, Any]] = ()
    if isinstance(value, Section):
        inside = value
    elif isinstance(value, tuple) and any(isinstance(item, Section) for item in value):
        inside = enumerate(value)
    else:
        yield dotted, value
    for key, item in inside:
        yield from _settings_in(item, f"{dotted}.{key}" if dotted else str(key))


def settings_of_today(saved: Mapping[str, Any]) -> Mapping[str, Any]:
    """What `settings` gave in an earlier version, in the names of today; as it is where that is no config today."""
    others = {name: value for name, value in saved.items() if not name.startswith("algorithm.")}
    algorithm = {name: value for name, value in saved.items() if name.startswith("algorithm.")}
    return _algorithm_of_today(algorithm) | {
        RENAMED.get(name, name): value for name, value in others.items() if value is not None or name not in RENAMED
    }


def _algorithm_of_today(saved: Mapping[str, Any]) -> dict[str, Any]:
    if not RENAMED.keys() & saved.keys():
        return dict(saved)
    flat = {name.removeprefix("algorithm."): value for name, value in saved.items()}
    try:
        algorithm = AlgorithmConfig.model_validate(of_today({"algorithm": flat}).values["algorithm"])
    except ValidationError:
        return dict(saved)
    return dict(_settings_in(algorithm, "algorithm"))


def render_resolved(loaded: LoadedConfig, *, defaults: bool = True) -> str:
    """The config as TOML, each value with its origin; what is `none` stands in a comment, TOML having no word.

    The text, saved as a recipe, gives the same config.

    Args:
        defaults: show what is at its default, too.
    """
    lines: list[str] = []
    table = ""
    # What is in no table, such as an empty list of rewards, can only stand before the first.
    for dotted, value in sorted(settings(loaded.config).items(), key=lambda item: "." in item[0]):
        section, _, key = dotted.rpartition(".")
        origin = loaded.origins.get(dotted, DEFAULT)
        if origin == DEFAULT and not defaults:
            continue
        if section and section != table:
            table = section
            name, _, last = section.rpartition(".")
            lines += ["", f"[[{name}]]" if last.isdecimal() else f"[{section}]"]
        entry = f"{'# ' if value is None else ''}{key} = {literal(value)}"
        lines.append(f"{entry:<48}  # {_one_line(origin)}")
    return "\n".join(lines).strip() + "\n"


def _one_line(text: str) -> str:
    return "".join(character if character.isprintable() else "?" for character in text)


def config_json(config: Config) -> str:
    """The resolved config as JSON with sorted keys, without secrets: the same config always gives the same text."""
    return json.dumps(public_values(config), indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
