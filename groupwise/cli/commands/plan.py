"""`groupwise plan`: what `groupwise train` with the same arguments will need and take."""

from __future__ import annotations

import argparse
import json

from groupwise.cli.commands.train import TRAIN_SETTINGS, add_train_arguments, load_for_training
from groupwise.cli.models import quiet_loading
from groupwise.cli.output import say
from groupwise.cli.parsing import Command, Parser, whole_number
from groupwise.errors import ConfigError


def _add_arguments(parser: Parser) -> None:
    add_train_arguments(parser)
    parser.add_argument(
        "--device",
        metavar="NAME",
        help="plan for h100-80gb, h200, a100-40gb, a100-80gb, l4, rtx4090, or cpu with --memory; without it, for the "
        "device at hand, which is measured for some seconds",
    )
    parser.add_argument("--memory", type=whole_number(1), metavar="GIB", help="with --device cpu: its memory")
    parser.add_argument(
        "--answer-tokens",
        type=whole_number(1),
        metavar="N",
        help="tokens of an answer on average, for seconds and tokens (default: the most that it may have)",
    )
    parser.add_argument("--json", action="store_true", help="print it as JSON: bytes, seconds, counts")


def _plan(args: argparse.Namespace) -> None:
    from groupwise.config.checks import check_trainable

    if args.memory is not None and args.device is None:
        raise ConfigError("--memory goes with --device cpu; without --device, what this machine has free is taken")
    loaded = load_for_training(args)
    if not args.resume:  # what needs no libraries is refused before they are loaded
        check_trainable(loaded.config)
    quiet_loading()
    from groupwise.plan import as_json, lines, make_plan
    from groupwise.plan.devices import GIB, named_device

    memory = None if args.memory is None else args.memory * GIB
    device = None if args.device is None else named_device(args.device, memory)
    plan = make_plan(loaded.config, device=device, answer=args.answer_tokens, resume=args.resume)
    say(json.dumps(as_json(plan), indent=2) if args.json else "\n".join(lines(plan)))


PLAN = Command(
    name="plan",
    summary="what a training run will need and take: memory, steps, seconds",
    add_arguments=_add_arguments,
    run=_plan,
    settings=TRAIN_SETTINGS,
    epilog="It takes the arguments of `groupwise train`, and loads no weights.",
)
