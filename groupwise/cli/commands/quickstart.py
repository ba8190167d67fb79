"""`groupwise quickstart`."""

from __future__ import annotations

import argparse

from groupwise.cli.parsing import Command, Parser, whole_number


def _arguments(parser: Parser) -> None:
    parser.add_argument("--output", default="runs/quickstart", metavar="DIR", help="default runs/quickstart")
    parser.add_argument("--seed", type=whole_number(0), default=0, metavar="N", help="default 0")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier quickstart in that folder")


def _quickstart(args: argparse.Namespace) -> None:
    from groupwise.quickstart.run import run_quickstart

    run_quickstart(args.output, args.seed, overwrite=args.overwrite)


QUICKSTART = Command(
    name="quickstart",
    summary="train a tiny model on word problems in four minutes, on any CPU, without a download",
    add_arguments=_arguments,
    run=_quickstart,
)
