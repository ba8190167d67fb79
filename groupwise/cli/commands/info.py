"""`groupwise algorithms` and `groupwise config`: what there is to choose."""

from __future__ import annotations

import argparse

from groupwise.cli.parsing import Command, Parser
from groupwise.errors import ConfigError


def _no_arguments(parser: Parser) -> None:
    del parser


def _algorithms(args: argparse.Namespace) -> None:
    del args
    from groupwise.config.algorithm import RECIPES

    records = RECIPES.values()
    width = max(len(record.name) for record in records)
    for record in records:
        print(f"{record.name:<{width}}  {record.summary}\n{'':<{width}}  {record.paper}")


def _config_arguments(parser: Parser) -> None:
    parser.add_argument("section", nargs="?", metavar="SECTION", help="only the keys that begin with this, e.g. optim")


def _config(args: argparse.Namespace) -> None:
    from groupwise.config.keys import describe_keys, nearest_key
    from groupwise.config.values import default_text

    section: str = (args.section or "").rstrip(".")
    keys = [key for key in describe_keys() if not section or key.name == section or key.name.startswith(f"{section}.")]
    if not keys:
        raise ConfigError(f"no setting begins with {section!r}: {nearest_key(section)}")
    for key in keys:
        default = "required" if key.required else f"= {default_text(key)}"
        print(f"{key.name} {default}  ({key.type_text})")
        if key.description:
            print(f"    {key.description}")


ALGORITHMS = Command(
    name="algorithms",
    summary="list the algorithms, for algorithm.name",
    add_arguments=_no_arguments,
    run=_algorithms,
)
CONFIG = Command(
    name="config",
    summary="list every setting with its default and meaning",
    add_arguments=_config_arguments,
    run=_config,
)
